"""Which tokens a step sees: a pure function of (seed, step), equal for any number of processes and any micro-batch.

A split is cut into windows of block_size tokens (plus the target of the last one). Each epoch visits all windows once,
in the order of a keyed permutation of its own, computed on the fly; resuming a run needs the step number alone.
"""

import numpy as np
import torch
from torch import Tensor

from gpt2.data.shards import TokenSet
from gpt2.pipeline.files import UserError

_MASK64 = (1 << 64) - 1


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of `positions` (integers below n) under a pseudo-random permutation of 0 … n-1 chosen by `key`.

    A four-round Feistel network over the next power of four, walked along its cycle until it falls below n (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Needs no memory beyond its arguments.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [np.uint64(_mix_int(key + r)) for r in range(4)]
    x = positions.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014) on uint64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    return int(_mix(np.array([x], dtype=np.uint64))[0])


def sample_windows(samples: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Window of each sample number, counted from 0 over all epochs of `n_windows` samples, each in its own order."""
    epochs, positions = np.divmod(samples, n_windows)
    windows = np.empty_like(samples)
    for epoch in np.unique(epochs):
        key = _mix_int(_mix_int(seed) ^ int(epoch))
        windows[epochs == epoch] = permute(positions[epochs == epoch], n_windows, key)
    return windows


class TrainOrder:
    """The training windows of every step.

    `batch_windows` windows of `block_size` tokens make a step; the windows run on without a gap from epoch to epoch.
    """

    def __init__(self, tokens: TokenSet, block_size: int, batch_windows: int, seed: int):
        """Raises UserError if the split does not fill a single batch."""
        self.tokens, self.block_size, self.batch_windows, self.seed = tokens, block_size, batch_windows, seed
        self.windows_per_epoch = (tokens.n_tokens - 1) // block_size
        if self.windows_per_epoch < batch_windows:
            raise UserError(
                f"{tokens.path} has {tokens.n_tokens} tokens, too few for one batch of "
                f"{batch_windows * block_size} + 1; lower train.tokens_per_step or prepare more text"
            )

    def windows(self, step: int, first: int, count: int) -> np.ndarray:
        """Window numbers of rows first … first + count - 1 of the batch of `step` (from 0)."""
        samples = step * self.batch_windows + np.arange(first, first + count)
        return sample_windows(samples, self.windows_per_epoch, self.seed)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (count, block_size) int64, of those rows; targets are the next tokens."""
        size = self.block_size
        tokens = [self.tokens.read(int(w) * size, size + 1) for w in self.windows(step, first, count)]
        rows = torch.from_numpy(np.stack(tokens).astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


class MicroBatches:
    """One process's share of the batches, on its device.

    A GPU works on while this process reads the next micro-batch. No thread does so: it would contend with the launching
    of kernels for the interpreter, and lose.
    """

    def __init__(self, order: TrainOrder, first: int, count: int, accumulation: int, device: torch.device):
        """Rows first … first + accumulation × count - 1 of each batch, `count` at a time."""
        self._order, self._first, self._count, self._accumulation = order, first, count, accumulation
        self._device = device
        self._ahead: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def get(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (count, block_size) int64, of one micro-batch."""
        if self._ahead and self._ahead[0] == (step, micro_step):
            idx, targets = self._ahead[1]
        else:
            idx, targets = self._read(step, micro_step)
        return idx.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def read_ahead(self, step: int, micro_step: int) -> None:
        """Read the micro-batch after this one, if the device has been given work that it does meanwhile."""
        if self._device.type == "cuda":
            last = micro_step == self._accumulation - 1
            following = (step + 1, 0) if last else (step, micro_step + 1)
            idx, targets = self._read(*following)
            # From pages that cannot move and hold it in one piece, the copy to the device waits for nothing.
            self._ahead = following, (idx.contiguous().pin_memory(), targets.contiguous().pin_memory())

    def _read(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        return self._order.batch(step, self._first + micro_step * self._count, self._count)
