"""The keys and values of a text, so that its next token costs a pass over one token and not over the whole text."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model import GPT, causal


class Cache:
    """Keys and values of `rows` texts of equal length, at most block_size tokens, under one model.

    The buffers, (rows, H, block_size, D) for each layer with its own number of heads, are allocated once and stay where
    they are.
    """

    def __init__(self, model: GPT, rows: int):
        self._model, self._rows, self._length = model, rows, 0
        weight, config = model.wte.weight, model.config
        shapes = [(rows, n_head, config.block_size, config.head_dim) for n_head in config.layer_heads]
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]

    def begin(self, idx: Tensor) -> Tensor:
        """Forget all tokens and take idx (B, T) in one pass; one row alone stands for all rows.

        Returns the hidden state of the last token, (B, C).
        """
        self._length = 0
        return self._run(idx)

    def extend(self, idx: Tensor) -> Tensor:
        """Add a token idx (rows, 1) to every text and return its hidden state, (rows, C)."""
        return self._run(idx)

    def keep(self, rows: Tensor) -> None:
        """Drop all texts but those at the ascending indices `rows`, which move to the front."""
        for buffer in (buffer for layer in self._layers for buffer in layer):
            buffer[: len(rows), :, : self._length] = buffer[rows, :, : self._length]
        self._rows = len(rows)

    def _run(self, idx: Tensor) -> Tensor:
        end = self._length + idx.shape[1]
        attends = [partial(self._attend, *layer) for layer in self._layers]
        hidden = self._model.hidden(idx, torch.arange(self._length, end, device=idx.device), attends)
        self._length = end
        return hidden[:, -1]

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, T, D) behind what `keys` and `values` hold; the weighted values of all of it."""
        end = self._length + k.shape[2]
        keys[: self._rows, :, self._length : end] = k
        values[: self._rows, :, self._length : end] = v
        if self._length == 0:
            return causal(q, k, v)
        # The one query is the last token, before which there is nothing to hide.
        return F.scaled_dot_product_attention(q, keys[: self._rows, :, :end], values[: self._rows, :, :end])
