"""A sample of a split in windows that lie evenly over it."""

import numpy as np
import torch
from torch import Tensor

from gpt2.files import UserError
from gpt2.shards import TokenSet


def spread_windows(tokens: TokenSet, block_size: int, n_tokens: int) -> Tensor:
    """Windows (n_tokens // block_size, block_size + 1) int64 of a split, one every so many.

    A corpus may be ordered by origin, so that one stretch of it is unlike another. Raises UserError if the split is too
    short or n_tokens less than a window.
    """
    count, available = n_tokens // block_size, (tokens.n_tokens - 1) // block_size
    if not 0 < count <= available:
        raise UserError(
            f"{tokens.path} has {tokens.n_tokens} tokens, {available} windows of {block_size}; {n_tokens} tokens, "
            f"{count} windows, were asked for; ask for 1 to {available} or prepare more text"
        )
    starts = np.arange(count) * available // count * block_size
    windows = np.stack([tokens.read(int(start), block_size + 1) for start in starts])
    return torch.from_numpy(windows.astype(np.int64))
