"""Cosine similarity of the QK and OV circuits of heads, from the weights alone (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits").

A head scores a query at x against a key at y by x' W_QK y, with W_QK = W_Q' W_K, and moves W_OV y to the query, with
W_OV = W_O W_V: two C x C matrices of rank D. Unlike queries, keys and values they do not depend on the basis that
training chose within the head. Two heads are compared by the cosine of these matrices, each as a vector of C^2 numbers.

The linear part of what is between a head and the residual stream belongs to its circuits:

- ln_1 is folded into the adjacent weights. In Pre-LN those are the weights that read: as LN(x) = g (x - mean) / s + b,
  the rows of W_Q, W_K and W_V are multiplied by the gain g and then centred. In Post-LN and DeepNorm the head reads the
  stream directly, and ln_1 normalises the sum of stream and head: W_O is centred over channels and multiplied by g.
- In Pre-LN W_O is centred over channels too: only norms read the stream, and they subtract its mean.
- The scale 1 / s depends on the token, is the same for all heads of a layer, and is omitted.
- Biases are omitted: they add terms that depend on the query or on the key alone, or on neither.

Letters: C channels, D channels of a head, M heads of all layers together.
"""

import numpy as np
import torch
from torch import Tensor

from gpt2.heads.similarity import cosine
from gpt2.model.gpt import GPT, Block

CIRCUITS = ("qk", "ov")


@torch.no_grad()
def compare_circuits(model: GPT) -> dict[str, np.ndarray]:
    """Cosines of W_QK and of W_OV between all heads of all layers: the CIRCUITS, each (M, M) float64.

    No C x C matrix is formed: the inner product of A' B and E' F is the sum of the entrywise product of the D x D
    matrices A E' and B F'. Memory is 64 M D C bytes in addition to the model, and products of one layer with all heads.
    """
    layers = [_fold(block) for block in model.h if block.attn.n_head]
    q, k, v, o = (torch.cat(parts) for parts in zip(*layers, strict=True))
    pairs = {"qk": (q, k), "ov": (o, v)}
    return {name: cosine(_multiply(*pairs[name], [len(layer[0]) for layer in layers])) for name in CIRCUITS}


def _fold(block: Block) -> tuple[Tensor, ...]:
    """W_Q, W_K, W_V and the transpose of W_O of a block's heads with ln_1 folded in, each (H, D, C) float64."""
    shape = (block.attn.n_head, block.attn.head_dim)
    reading = block.attn.c_attn.weight.double().unflatten(0, (3, *shape))
    writing = block.attn.c_proj.weight.double().t().unflatten(0, shape)
    writing = writing - writing.mean(-1, keepdim=True)
    gain = block.ln_1.weight.double()
    if block.pre_norm:
        reading = reading * gain
        reading = reading - reading.mean(-1, keepdim=True)
    else:
        writing = writing * gain
    return (*reading.unbind(), writing)


def _multiply(left: Tensor, right: Tensor, layers: list[int]) -> np.ndarray:
    """Inner products (M, M) of the matrices left' right of all heads.

    left, right: (M, D, C). layers: the number of heads of each layer; the rows of one layer are computed at a time.
    """
    rows = []
    for a, b in zip(left.split(layers), right.split(layers), strict=True):
        products = [torch.einsum("hdc,mec->hmde", here, whole) for here, whole in ((a, left), (b, right))]
        rows.append((products[0] * products[1]).sum((-2, -1)))
    return torch.cat(rows).cpu().numpy()
