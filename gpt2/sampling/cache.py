"""The keys and values of a text, so that its next token costs a pass over one token and not over the whole text."""

import math
from functools import partial

import torch
from torch import Tensor

from gpt2.model.gpt import GPT, causal
from gpt2.sampling.cuda_graph import CudaGraph


class Cache:
    """Keys and values of `rows` texts of equal length, at most block_size tokens, under one model.

    The buffers, (rows, H, block_size, D) for each layer with its own number of heads, are allocated once and never
    move.
    """

    def __init__(self, model: GPT, rows: int):
        self._model, self._rows, self._length = model, rows, 0
        weight, config = model.wte.weight, model.config
        shapes = [(rows, n_head, config.block_size, config.head_dim) for n_head in config.layer_heads]
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]
        self._position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        if weight.is_cuda:
            # Triton comes with torch for GPUs alone.
            from gpt2.sampling.decode_kernels import step

            self._step_on_gpu = CudaGraph(partial(step, model, self._layers))

    def begin(self, idx: Tensor) -> Tensor:
        """Forget all tokens and read idx (B, T) in one pass; a single row stands for all rows.

        Returns the hidden state of the last token, (B, C).
        """
        self._length = 0
        hidden = self._read(idx)
        self._length = idx.shape[1]
        return hidden

    def extend(self, idx: Tensor) -> Tensor:
        """Add a token idx (rows, 1) to every text and return its hidden state, (rows, C), valid until the next call."""
        self._position.fill_(self._length)
        hidden = self._step_on_gpu(idx, self._position) if idx.is_cuda else self._read(idx, self._position)
        self._length += 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Drop all texts but those at the ascending indices `rows`, which move to the front; on a CPU alone."""
        for buffer in (buffer for layer in self._layers for buffer in layer):
            buffer[: len(rows), :, : self._length] = buffer[rows, :, : self._length]
        self._rows = len(rows)

    def _read(self, idx: Tensor, positions: Tensor | None = None) -> Tensor:
        attends = [partial(self._attend, *layer) for layer in self._layers]
        return self._model.hidden(idx, positions, attends)[:, -1]

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, T, D) behind the other keys and values; causal attention of q to all of them.

        T is 1 unless there are no others.
        """
        end = self._length + k.shape[2]
        keys, values = keys[: self._rows, :, :end], values[: self._rows, :, :end]
        keys[:, :, self._length :], values[:, :, self._length :] = k, v
        if self._length == 0:
            return causal(q, k, v)
        return (q @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1) @ values
