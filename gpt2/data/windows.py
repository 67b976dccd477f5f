"""Fixed windows of a split for evaluation and analysis: consecutive ones, or ones spread evenly over the split."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gpt2.data.shards import TokenSet
from gpt2.pipeline.files import UserError


def eval_windows(tokens: TokenSet, block_size: int, n_tokens: int, start: int = 0) -> Tensor:
    """Consecutive windows (n_tokens // block_size, block_size + 1) int64 from token `start` on, one token overlapping.

    Each window predicts block_size tokens, so a fixed n_tokens is a fixed set of predictions. Raises UserError if the
    split is too short or n_tokens is less than a window.
    """
    count = n_tokens // block_size
    needed = start + count * block_size + 1
    if count == 0 or needed > tokens.n_tokens:
        raise UserError(
            f"{tokens.path} has {tokens.n_tokens} tokens; {max(needed, block_size + 1)} are needed for {n_tokens} "
            f"in windows of {block_size}; ask for fewer tokens or prepare more text"
        )
    stream = torch.from_numpy(tokens.read(start, count * block_size + 1).astype(np.int64))
    return stream.unfold(0, block_size + 1, block_size)


def spread_windows(tokens: TokenSet, block_size: int, n_tokens: int) -> Tensor:
    """Windows (n_tokens // block_size, block_size + 1) int64 of a split, one every so many.

    A corpus may be ordered by origin, so that one stretch of it is unlike another. Raises UserError if the split is too
    short or n_tokens less than a window.
    """
    starts = _spread_starts(tokens, block_size, n_tokens)
    windows = np.stack([tokens.read(start, block_size + 1) for start in starts])
    return torch.from_numpy(windows.astype(np.int64))


def group_windows(tokens: TokenSet, block_size: int, n_tokens: int) -> np.ndarray:
    """Group number (N,), ascending from 0, of each window of spread_windows: windows that share a document are in one
    group, as are windows linked by a chain of such windows. The last target of a window does not count, since it may
    begin the next document. Raises UserError as spread_windows does.
    """
    starts = _spread_starts(tokens, block_size, n_tokens)
    # An end-of-text token begins each document.
    between = (tokens.read(before + block_size, start - before - block_size + 1) for before, start in pairwise(starts))
    return np.cumsum([0, *(tokens.vocabulary.eot_token in ids for ids in between)])


def _spread_starts(tokens: TokenSet, block_size: int, n_tokens: int) -> list[int]:
    """First tokens of the windows of spread_windows."""
    count, available = n_tokens // block_size, (tokens.n_tokens - 1) // block_size
    if not 0 < count <= available:
        raise UserError(
            f"{tokens.path} has {tokens.n_tokens} tokens, {available} windows of {block_size}; {n_tokens} tokens, "
            f"{count} windows, were asked for; ask for 1 to {available} or prepare more text"
        )
    return (np.arange(count) * available // count * block_size).tolist()
