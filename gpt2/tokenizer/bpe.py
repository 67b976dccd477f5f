"""Byte-level BPE vocabularies trained with the `tokenizers` library and used through tiktoken, as GPT-2's is."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken
from pydantic import PositiveInt
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config
from gpt2.prepare.corpus import read_split
from gpt2.tokenizer.encodings import MIN_VOCAB_SIZE, N_BYTES, load_encoding, make_encoding, trained_size

# A pair seen once is no statistic; merging it would only memorise the text.
MIN_PAIR_COUNT = 2


class VocabularyConfig(Config):
    """Section `vocabulary`: the text that vocabularies are trained on."""

    # Limit on the UTF-8 bytes of whole documents, taken from the beginning of the training split.
    train_bytes: PositiveInt


def read_training_text(corpus: Path, config: VocabularyConfig) -> list[str]:
    """The documents that vocabularies are trained on. Raises UserError if there are none."""
    return take(read_split(corpus, "train"), config.train_bytes, "vocabulary.train_bytes")


def take(texts: Iterable[str], max_bytes: int, key: str) -> list[str]:
    """The first texts, at most `max_bytes` of UTF-8 in total. Raises UserError naming `key` if the first has more."""
    taken, total = [], 0
    for text in texts:
        total += len(text.encode("utf-8"))
        if total > max_bytes:
            break
        taken.append(text)
    if not taken:
        raise UserError(f"{key}={max_bytes}: the first document has more bytes; raise it")
    return taken


def encoding_for(name: str, corpus: Path, config: VocabularyConfig) -> tiktoken.Encoding:
    """GPT-2's encoding, or the encoding `bpe_<size>`, trained as in the tokenizer study.

    Raises UserError if the training text is too small for it.
    """
    size = trained_size(name)
    return train_encodings(read_training_text(corpus, config), [size])[0] if size else load_encoding(name)


def train_encodings(texts: Sequence[str], vocab_sizes: Sequence[int]) -> list[tiktoken.Encoding]:
    """Byte-level BPE encodings `bpe_<size>` of increasing sizes, each with end-of-text as its last id.

    BPE adds one token after the other, so a smaller vocabulary is a prefix of a larger one: only the largest is
    trained. Raises UserError if a size is below all bytes and end-of-text, or the texts have too few pairs.
    """
    if vocab_sizes[0] < MIN_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_sizes[0]} tokens lacks some of the 256 bytes and end-of-text; raise it"
        )
    tokens = trained_tokens(train_tokenizer(texts, vocab_sizes[-1] - 1))
    if len(tokens) < vocab_sizes[-1] - 1:
        raise UserError(
            f"a vocabulary of {vocab_sizes[-1]} tokens is more than the {len(tokens) + 1} that {len(texts)} documents "
            "of training text yield; lower tokenize.encoding or tokenizer_study.vocab_sizes, whichever asks for it, or "
            "raise vocabulary.train_bytes"
        )
    return [make_encoding(f"bpe_{size}", tokens[: size - 1]) for size in vocab_sizes]


def train_tokenizer(texts: Sequence[str], n_tokens: int) -> Tokenizer:
    """Train byte-level BPE of at most `n_tokens` tokens, with GPT-2's pre-tokenisation and no special token.

    The result does not depend on the order of the texts nor on the number of threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=MIN_PAIR_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def trained_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The tokens of byte-level BPE as bytes, in the order of their ids: the 256 bytes, then the merges."""
    byte_of = byte_of_character()
    vocabulary = tokenizer.get_vocab()
    return [
        bytes(byte_of[character] for character in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)
    ]


def byte_of_character() -> dict[str, int]:
    """The byte of each character of GPT-2's files: printable Latin-1 is itself, the others are U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(N_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(N_BYTES + i): byte for i, byte in enumerate(others)}
