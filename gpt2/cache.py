"""The keys and values of a text, so that its next token costs a pass over one token and not over the whole text."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.model import GPT, causal

# A graph of a step reads so many keys, or a multiple: few graphs to record, and few keys read in vain.
SPAN = 256


class Step(NamedTuple):
    """A step recorded as a CUDA graph, and the tensors from and to which it works."""

    graph: torch.cuda.CUDAGraph
    # (rows, 1) token ids and (1,) their position.
    idx: Tensor
    position: Tensor
    # (rows, C)
    hidden: Tensor


class Cache:
    """Keys and values of `rows` texts of equal length, at most block_size tokens, under one model.

    The buffers, (rows, H, block_size, D) for each layer with its own number of heads, are allocated once and stay where
    they are.
    """

    def __init__(self, model: GPT, rows: int):
        self._model, self._rows, self._length = model, rows, 0
        weight, config = model.wte.weight, model.config
        shapes = [(rows, n_head, config.block_size, config.head_dim) for n_head in config.layer_heads]
        # Zeros, since a graph reads keys that are not there yet, and NaN times zero is NaN.
        self._layers = [(weight.new_zeros(shape), weight.new_zeros(shape)) for shape in shapes]
        # By the number of rows and of keys.
        self._steps: dict[tuple[int, int], Step] = {}

    def begin(self, idx: Tensor) -> Tensor:
        """Forget all tokens and take idx (B, T) in one pass; one row alone stands for all rows.

        Returns the hidden state of the last token, (B, C).
        """
        self._length = 0
        attends = [partial(self._attend_within, *layer) for layer in self._layers]
        hidden = self._model.hidden(idx, attends=attends)
        self._length = idx.shape[1]
        return hidden[:, -1]

    def extend(self, idx: Tensor) -> Tensor:
        """Add a token idx (rows, 1) to every text and return its hidden state, (rows, C), valid until the next call."""
        position = torch.tensor([self._length], device=idx.device)
        hidden = self._replay(idx, position) if idx.is_cuda else self._step(idx, position, self._length + 1)
        self._length += 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Drop all texts but those at the ascending indices `rows`, which move to the front."""
        for buffer in (buffer for layer in self._layers for buffer in layer):
            buffer[: len(rows), :, : self._length] = buffer[rows, :, : self._length]
        self._rows = len(rows)

    def _step(self, idx: Tensor, position: Tensor, span: int) -> Tensor:
        """Hidden states (rows, C) of the tokens idx (rows, 1) at `position` (1,), which see the first `span` keys."""
        visible = (torch.arange(span, device=idx.device) <= position).view(1, 1, 1, span)
        attends = [partial(self._attend_all, *layer, position, visible) for layer in self._layers]
        return self._model.hidden(idx, position, attends)[:, -1]

    def _replay(self, idx: Tensor, position: Tensor) -> Tensor:
        """`_step` from a graph: a GPU takes longer to be told the kernels of a step one by one than to run them."""
        span = min((self._length // SPAN + 1) * SPAN, self._model.config.block_size)
        if (self._rows, span) not in self._steps:
            self._steps[self._rows, span] = self._record(idx, position, span)
        step = self._steps[self._rows, span]
        step.idx.copy_(idx)
        step.position.copy_(position)
        step.graph.replay()
        return step.hidden

    def _record(self, idx: Tensor, position: Tensor, span: int) -> Step:
        idx, position = idx.clone(), position.clone()
        # Once without recording, for what libraries set up at their first call.
        self._step(idx, position, span)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self._step(idx, position, span)
        return Step(graph, idx, position, hidden)

    def _attend_within(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, T, D) as the first keys and values; causal attention among them."""
        keys[: self._rows, :, : k.shape[2]] = k
        values[: self._rows, :, : v.shape[2]] = v
        return causal(q, k, v)

    def _attend_all(
        self, keys: Tensor, values: Tensor, position: Tensor, visible: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Store k and v (rows, H, 1, D) at `position` (1,); attention to the keys of `visible` (1, 1, 1, span)."""
        span = visible.shape[-1]
        keys, values = (
            buffer[: self._rows].index_copy_(2, position, new)[:, :, :span] for buffer, new in ((keys, k), (values, v))
        )
        # Written out, since for one query on a GPU these products take a third of the time of the fused kernel.
        scores = q @ keys.mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values
