"""The keys and values of a text, so that its next token costs a pass over one token and not over the whole text."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpt2.model.gpt import GPT, Block, causal
from gpt2.sampling.cuda_graph import CudaGraph


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
        self._position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._step_on_gpu = CudaGraph(partial(_step_on_gpu, model, self._layers))

    def begin(self, idx: Tensor) -> Tensor:
        """Forget all tokens and take idx (B, T) in one pass; one row alone stands for all rows.

        Returns the hidden state of the last token, (B, C).
        """
        attends = [partial(self._attend_within, *layer) for layer in self._layers]
        hidden = self._model.hidden(idx, attends=attends)
        self._length = idx.shape[1]
        return hidden[:, -1]

    def extend(self, idx: Tensor) -> Tensor:
        """Add a token idx (rows, 1) to every text and return its hidden state, (rows, C), valid until the next call."""
        self._position.fill_(self._length)
        hidden = self._step_on_gpu(idx, self._position) if idx.is_cuda else self._step(idx)
        self._length += 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Drop all texts but those at the ascending indices `rows`, which move to the front; on a CPU alone."""
        for buffer in (buffer for layer in self._layers for buffer in layer):
            buffer[: len(rows), :, : self._length] = buffer[rows, :, : self._length]
        self._rows = len(rows)

    def _step(self, idx: Tensor) -> Tensor:
        attends = [partial(self._attend_all, *layer) for layer in self._layers]
        return self._model.hidden(idx, self._position, attends)[:, -1]

    def _attend_within(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, T, D) as the first keys and values; causal attention among them."""
        keys[: self._rows, :, : k.shape[2]] = k
        values[: self._rows, :, : v.shape[2]] = v
        return causal(q, k, v)

    def _attend_all(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (rows, H, 1, D) behind the other keys and values; attention to all of them."""
        end = self._length + 1
        keys, values = keys[: self._rows, :, :end], values[: self._rows, :, :end]
        keys[:, :, -1:], values[:, :, -1:] = k, v
        return (q @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1) @ values


def _step_on_gpu(model: GPT, layers: list[tuple[Tensor, Tensor]], idx: Tensor, position: Tensor) -> Tensor:
    """Hidden states (rows, C) of the tokens idx (rows, 1) at `position` (1,), by kernels of our own.

    They read the position on the GPU, so that one recording serves all lengths.
    """
    # Triton comes with torch for GPUs alone.
    from gpt2.sampling.decode_kernels import MAX_ROWS, attend_cache

    attends = [partial(attend_cache, keys=keys, values=values, position=position) for keys, values in layers]
    if len(idx) > MAX_ROWS:
        return model.hidden(idx, position, attends)[:, -1]
    x = model.wte(idx[:, 0]) + model.wpe(position)
    for block, attend_layer in zip(model.h, attends, strict=True):
        x = _fused(block, x, attend_layer)
    return model.ln_f(x)


def _fused(block: Block, x: Tensor, attend_cache: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Block.forward for one token of each row, x (rows, C), with norms and sums inside the products."""
    from gpt2.sampling.decode_kernels import linear

    attn, mlp = block.attn, block.mlp
    ln_1, ln_2 = (block.ln_1, block.ln_2) if block.pre_norm else (None, None)
    if attn.n_head:
        qkv = linear(x, attn.c_attn, norm=ln_1).view(len(x), 3, attn.n_head, 1, attn.head_dim)
        x = linear(attend_cache(*qkv.unbind(1)).reshape(len(x), -1), attn.c_proj, residual=x, alpha=block.alpha)
    else:
        x = block.alpha * x + attn.c_proj.bias
    x = x if block.pre_norm else block.ln_1(x)
    x = linear(linear(x, mlp.c_fc, norm=ln_2, gelu=True), mlp.c_proj, residual=x, alpha=block.alpha)
    return x if block.pre_norm else block.ln_2(x)
