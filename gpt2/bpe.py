"""Byte-level BPE vocabularies trained with the `tokenizers` library and used through tiktoken, as GPT-2's is."""

from collections.abc import Sequence

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt2.files import UserError
from gpt2.tokenizer import END_OF_TEXT, PATTERN

N_BYTES = 256
# All bytes and end-of-text.
MIN_VOCAB_SIZE = N_BYTES + 1
# Token files are uint16.
MAX_VOCAB_SIZE = 2**16
# A pair seen once is no statistic; merging it would only memorise the text.
MIN_PAIR_COUNT = 2


def train_encodings(texts: Sequence[str], vocab_sizes: Sequence[int]) -> list[tiktoken.Encoding]:
    """Byte-level BPE encodings `bpe_<size>` of increasing sizes, each with end-of-text as its last id.

    BPE adds one token after the other, so a smaller vocabulary is the beginning of a larger one: only the largest is
    trained. Raises UserError if the texts have too few pairs for it.
    """
    tokens = ranked_tokens(train_tokenizer(texts, vocab_sizes[-1] - 1))
    if len(tokens) < vocab_sizes[-1] - 1:
        raise UserError(
            f"tokenizer_study.vocab_sizes={vocab_sizes[-1]} asks for more than the {len(tokens) + 1} tokens that "
            f"{len(texts)} documents of training text yield; lower it or raise train_bytes"
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


def ranked_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The tokens of byte-level BPE as bytes, in the order of their ids: the 256 bytes, then the merges."""
    byte_of = byte_of_character()
    vocabulary = tokenizer.get_vocab()
    return [bytes(byte_of[character] for character in token) for token in sorted(vocabulary, key=vocabulary.get)]


def byte_of_character() -> dict[str, int]:
    """GPT-2's writing of bytes as characters: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(N_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(N_BYTES + i): byte for i, byte in enumerate(others)}


def make_encoding(name: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """A tiktoken encoding of `tokens`, ids in their order, and end-of-text after them."""
    return tiktoken.Encoding(
        name=name,
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
        explicit_n_vocab=len(tokens) + 1,
    )
