"""The corpus as token files: every document behind an end-of-text token, in the order of the corpus."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken
from pydantic import PositiveInt, field_validator

from gpt2.files import UserError
from gpt2.params import Config
from gpt2.shards import MAX_VOCAB_SIZE, TokenSet, Vocabulary, write_split
from gpt2.tokenizer import GPT2, MIN_VOCAB_SIZE, trained_size

SPLITS = ("train", "val", "test")
# Documents encoded at a time: enough to keep all threads busy, few enough to stay small in memory.
BATCH = 1024
log = logging.getLogger(__name__)


class TokenizeConfig(Config):
    """Section `tokenize`."""

    # gpt2, or bpe_<size> of a vocabulary trained on the training split.
    encoding: str
    # Tokens of one shard file, two bytes each.
    shard_tokens: PositiveInt

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        size = trained_size(name)
        if name != GPT2 and size is None:
            raise ValueError(f"must be {GPT2}, or bpe_N for a trained vocabulary of N tokens, such as bpe_8192")
        if size is not None and not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary must have at least {MIN_VOCAB_SIZE} tokens, all bytes and end-of-text, and at most "
                f"{MAX_VOCAB_SIZE}, since token files are uint16"
            )
        return name


def tokenize_corpus(
    corpus: Path, folder: Path, encoding: tiktoken.Encoding, shard_tokens: int, threads: int
) -> dict[str, float]:
    """Write all splits of `corpus` to `folder`; return the figures of metrics/tokens.json.

    `bytes_per_token` is UTF-8 bytes of text over tokens, separators included, of all splits.
    """
    vocabulary = Vocabulary(encoding=encoding.name, vocab_size=encoding.n_vocab, eot_token=encoding.eot_token)
    figures: dict[str, float] = {"vocab_size": vocabulary.vocab_size}
    n_bytes = n_tokens = 0
    for split in SPLITS:
        write_split(folder, split, _encode(corpus / split, encoding, threads), vocabulary, shard_tokens)
        tokens = TokenSet(folder, split)
        figures[f"tokens_{split}"] = tokens.n_tokens
        figures[f"documents_{split}"] = tokens.n_documents
        n_tokens += tokens.n_tokens
        n_bytes += tokens.n_bytes
    figures["bytes_per_token"] = n_bytes / n_tokens
    return figures


def _encode(folder: Path, encoding: tiktoken.Encoding, threads: int) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids and UTF-8 bytes of every document of a split, files in sorted order."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no Parquet file; run `dvc repro prepare`")
    n_bytes, started = 0, time.perf_counter()
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["text"]):
            texts = batch["text"].to_pylist()
            sizes = [len(text.encode()) for text in texts]
            for ids, size in zip(encoding.encode_ordinary_batch(texts, num_threads=threads), sizes, strict=True):
                yield np.array([encoding.eot_token, *ids], dtype=np.uint16), size
            n_bytes += sum(sizes)
        rate = n_bytes / 1e6 / (time.perf_counter() - started)
        log.info("%s: %.1f MB of text, %.1f MB/s", file, n_bytes / 1e6, rate)
