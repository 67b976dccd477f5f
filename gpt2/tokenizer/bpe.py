"""Byte-level BPE vocabularies trained with the `tokenizers` library and used through tiktoken, as GPT-2's is.

python -m gpt2.tokenizer.bpe --size 8192 --train_bytes 20000000 --out FOLDER
"""

import json
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken
from pydantic import PositiveInt
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config, build
from gpt2.prepare.corpus import read_split
from gpt2.tokenizer.encodings import MIN_VOCAB_SIZE, N_BYTES, load_encoding, make_encoding, trained_size, write_encoding

# A pair seen once is no statistic; merging it would only memorise the text.
MIN_PAIR_COUNT = 2


class VocabularyConfig(Config):
    """Section `vocabulary`: the text that vocabularies are trained on, which makes of bpe_8192 one of them."""

    # Limit on the UTF-8 bytes of whole documents, taken from the beginning of the training split.
    train_bytes: PositiveInt


def read_training_text(corpus: Path, config: VocabularyConfig) -> list[str]:
    """The documents that vocabularies are trained on. Raises UserError if there are none."""
    return take(read_split(corpus, "train"), config.train_bytes, "vocabulary.train_bytes")


def take(texts: Iterable[str], max_bytes: int, key: str) -> list[str]:
    """The first texts that have at most `max_bytes` of UTF-8 together. Raises UserError naming `key` if none does."""
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
    """GPT-2's encoding, or the one of the name `bpe_<size>`, trained as the tokenizer study trains it.

    Raises UserError if the training text is too small for it.
    """
    size = trained_size(name)
    return train_encodings(read_training_text(corpus, config), [size])[0] if size else load_encoding(name)


def train_encodings(texts: Sequence[str], vocab_sizes: Sequence[int]) -> list[tiktoken.Encoding]:
    """Byte-level BPE encodings `bpe_<size>` of increasing sizes, each with end-of-text as its last id.

    BPE adds one token after the other, so a smaller vocabulary is the beginning of a larger one: only the largest is
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
    """GPT-2's writing of bytes as characters: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(N_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(N_BYTES + i): byte for i, byte in enumerate(others)}


def own_peak_memory_gib() -> float:
    """Largest resident set of this process, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a new process begins with the size of the one that started it.
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main(argv: list[str] | None = None) -> None:
    """The command line above: writes the vocabulary, and as JSON what it took."""
    parser = Parser(prog="python -m gpt2.tokenizer.bpe", description="Train a vocabulary on a training split.")
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder that the stage prepare wrote")
    parser.add_argument("--size", type=int, required=True, help="tokens, with all 256 bytes and end-of-text")
    parser.add_argument("--train_bytes", type=int, required=True, help="bytes of the training split to read at most")
    parser.add_argument("--out", type=Path, required=True, help="folder for bpe_SIZE.tiktoken")
    arguments = parser.parse_args(argv)
    with reporting("bpe"):
        config = build(VocabularyConfig, {"train_bytes": arguments.train_bytes}, "--train_bytes")
        texts = read_training_text(arguments.corpus, config)
        started = time.perf_counter()
        (encoding,) = train_encodings(texts, [arguments.size])
        seconds = time.perf_counter() - started
        write_encoding(encoding, arguments.out)
    sys.stdout.write(
        json.dumps({"seconds": round(seconds, 3), "peak_memory_gib": round(own_peak_memory_gib(), 3)}) + "\n"
    )


if __name__ == "__main__":
    main()
