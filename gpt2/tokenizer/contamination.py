"""Benchmark items whose answers occur in the training tokens, by comparing runs of tokens as in the GPT-3 paper."""

from contextlib import closing
from functools import partial, reduce
from pathlib import Path

import numpy as np

from gpt2.data.shards import TokenSet
from gpt2.hellaswag.items import ENDINGS, Benchmark
from gpt2.pipeline.workers import in_order

# Length of the run looked for (Brown et al. 2020 use 13 words), and how many of its tokens belong to the right ending.
RUN, OF_ENDING = 13, 6
# Hashed at a time, so that it stays in a processor's cache, and by one process in one go.
CHUNK_TOKENS, TASK_TOKENS = 2**16, 2**23
# Training tokens for which it pays to start a process.
PROCESS_TOKENS = 2**27
BASE = 0x9E3779B97F4A7C15
# Its powers modulo 2^64.
_POWERS = {n: np.uint64(pow(BASE, n, 2**64)) for n in (1, 2, 4)}


def items_in_training(benchmark: Benchmark, train: TokenSet, workers: int = 1) -> np.ndarray:
    """Which items have the end of the context and the start of the right ending in the training tokens, (N,) bool.

    The run has RUN tokens, at most OF_ENDING of them from the ending; a shorter ending leaves more to the context. An
    item with fewer than RUN tokens is never found. At most `workers` processes search.
    """
    rows = benchmark.protocols["completion"]
    answers = np.arange(len(benchmark.labels)) * ENDINGS + benchmark.labels
    ends = rows.offsets[answers + 1] - np.maximum(0, rows.ending_tokens[answers] - OF_ENDING)
    whole = ends - rows.offsets[answers] >= RUN
    wanted = np.array([_hash_runs(rows.tokens[end - RUN : end])[0] for end in ends[whole]], dtype=np.uint64)
    in_training = np.zeros(len(whole), dtype=bool)
    in_training[whole] = _find_anywhere(train, wanted, workers)
    return in_training


def _find_anywhere(train: TokenSet, wanted: np.ndarray, workers: int) -> np.ndarray:
    """Which of the `wanted` hashes some run of the training tokens has, bool (len(wanted),)."""
    processes = max(1, min(workers, train.n_tokens // PROCESS_TOKENS))
    if processes == 1:
        return _find(train, wanted, 0, train.n_tokens)
    search = partial(_open_and_find, train.path, wanted)
    with closing(in_order(search, range(0, train.n_tokens, TASK_TOKENS), processes)) as parts:
        return reduce(np.logical_or, parts)


def _open_and_find(path: Path, wanted: np.ndarray, start: int) -> np.ndarray:
    """The task of a process: TASK_TOKENS runs from `start` on, in the split at `path`."""
    return _find(TokenSet(path.parent, path.name), wanted, start, start + TASK_TOKENS)


def _find(train: TokenSet, wanted: np.ndarray, start: int, end: int) -> np.ndarray:
    """Which of the `wanted` hashes a run has that begins at tokens start … end - 1, bool (len(wanted),)."""
    found = np.zeros(len(wanted), dtype=bool)
    # A table of one bit a bucket leaves few runs for the exact comparison.
    buckets = np.zeros(2**24, dtype=bool)
    buckets[wanted >> np.uint64(40)] = True
    for first in range(start, min(end, train.n_tokens - RUN + 1), CHUNK_TOKENS):
        runs = _hash_runs(train.read(first, min(CHUNK_TOKENS + RUN - 1, train.n_tokens - first)))
        found |= np.isin(wanted, runs[buckets[runs >> np.uint64(40)]])
    return found


def _hash_runs(tokens: np.ndarray) -> np.ndarray:
    """64-bit polynomial hash of every run of RUN = 8 + 4 + 1 tokens, uint64 (len(tokens) - RUN + 1,).

    The hash of a run is that of its first part times a power of the base for each token behind, plus that of the rest.
    """
    one = tokens.astype(np.uint64) + np.uint64(1)
    two = one[:-1] * _POWERS[1] + one[1:]
    four = two[:-2] * _POWERS[2] + two[2:]
    eight = four[:-4] * _POWERS[4] + four[4:]
    twelve = eight[:-4] * _POWERS[4] + four[8:]
    return twelve[:-1] * _POWERS[1] + one[12:]
