"""Does the training text hold the answers of the benchmark? Runs of tokens are compared, as in the GPT-3 paper."""

import numpy as np

from gpt2.items import ENDINGS, Benchmark
from gpt2.shards import TokenSet

# Length of the run looked for (Brown et al. 2020 use 13 words), and how many of its tokens belong to the right ending.
RUN, OF_ENDING = 13, 6
CHUNK_TOKENS = 2**20
_BASE = np.uint64(0x9E3779B97F4A7C15)


def items_in_training(benchmark: Benchmark, train: TokenSet) -> int:
    """Number of items whose last context tokens and first tokens of the right ending stand in the training tokens.

    A run that is shorter than RUN tokens because context or ending are short is looked for as far as it goes back; an
    item with fewer than RUN tokens in all is passed over.
    """
    rows = benchmark.protocols["completion"]
    answers = np.arange(len(benchmark.labels)) * ENDINGS + benchmark.labels
    ends = rows.offsets[answers + 1] - np.maximum(0, rows.ending_tokens[answers] - OF_ENDING)
    whole = ends - rows.offsets[answers] >= RUN
    wanted = np.array([_hash_runs(rows.tokens[end - RUN : end])[0] for end in ends[whole]], dtype=np.uint64)
    found = np.zeros(len(wanted), dtype=bool)
    # A table of one bit a bucket leaves few runs for the exact comparison.
    buckets = np.zeros(2**24, dtype=bool)
    buckets[wanted >> np.uint64(40)] = True
    for start in range(0, train.n_tokens - RUN + 1, CHUNK_TOKENS):
        runs = _hash_runs(train.read(start, min(CHUNK_TOKENS + RUN - 1, train.n_tokens - start)))
        found |= np.isin(wanted, runs[buckets[runs >> np.uint64(40)]])
    return int(found.sum())


def _hash_runs(tokens: np.ndarray) -> np.ndarray:
    """64-bit polynomial hash of every run of RUN tokens, uint64 (len(tokens) - RUN + 1,)."""
    n = len(tokens) - RUN + 1
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(RUN):
        hashes = hashes * _BASE + tokens[i : i + n].astype(np.uint64) + np.uint64(1)
    return hashes
