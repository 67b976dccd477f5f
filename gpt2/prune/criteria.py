"""Rankings of the heads of a model, the first to remove first, by criteria that score the whole model once.

iterative.py has criteria that score the model again after removals.

Letters: B sequences, T tokens, C channels, H heads of a layer, D channels of a head, M heads of all layers together.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gpt2.heads.redundancy import COSINES
from gpt2.heads.similarity import Head, list_heads
from gpt2.model.gpt import GPT

Order = list[Head]
# Similarities that may predict which heads can be removed: the column of each in heads.csv, and its matrix.
COST_SIMILARITIES = {name: COSINES[name][0] for name in ("similarity", "nosink", "output", "written", "qk", "ov")}
# Matrices other than that of the patterns by which redundancy is ranked too, as criteria with the prefix.
SIMILAR_ORDERS = tuple(COST_SIMILARITIES.values())[1:]
SIMILARITY_PREFIX = "similarity_"


def rank_heads(
    model: GPT, similarity: np.ndarray, taylor: Sequence[Tensor], seeds: Sequence[int]
) -> dict[str, list[Order]]:
    """The orders of each criterion: one per seed for random, one for each of the others.

    similarity (M, M): cosines of the attention patterns; taylor: the result of score_taylor.
    """
    heads = list_heads(model.config)
    return {
        "redundancy": [order_by_redundancy(similarity, heads)],
        "taylor": [order_by_score(taylor)],
        "magnitude": [order_by_score(score_magnitude(model))],
        "random": [order_at_random(heads, seed) for seed in seeds],
    }


def rank_by_similarity(similarities: Mapping[str, np.ndarray], heads: Sequence[Head]) -> dict[str, list[Order]]:
    """The order of order_by_redundancy by each of SIMILAR_ORDERS; similarities are (M, M) each."""
    return {f"{SIMILARITY_PREFIX}{name}": [order_by_redundancy(similarities[name], heads)] for name in SIMILAR_ORDERS}


def order_by_redundancy(similarity: np.ndarray, heads: Sequence[Head]) -> Order:
    """From the most similar pair left within a layer, remove the head with the higher mean similarity to its layer.

    The mean is over the heads left in the layer; on a tie the later head goes. When each layer has one head left, the
    same rule ranks the rest across layers.
    """
    layers, left, order = np.array([head.layer for head in heads]), list(range(len(heads))), []
    while len(left) > 1:
        cosines, comparable = similarity[np.ix_(left, left)], ~np.eye(len(left), dtype=bool)
        within = comparable & (layers[left][:, None] == layers[left])
        comparable = within if within.any() else comparable
        first, second = np.unravel_index(np.argmax(np.where(comparable, cosines, -np.inf)), cosines.shape)
        alike = [cosines[place, comparable[place]].mean() for place in (first, second)]
        order.append(heads[left.pop(first if alike[0] > alike[1] else second)])
    return order + [heads[last] for last in left]


def order_at_random(heads: Sequence[Head], seed: int) -> Order:
    """A permutation of the heads that depends on `seed` only."""
    return [heads[i] for i in np.random.Generator(np.random.PCG64([seed])).permutation(len(heads))]


def order_by_score(scores: Sequence[Tensor]) -> Order:
    """Lowest score first, ties by position; scores: one tensor (H,) per layer."""
    scored = [
        (value, Head(layer, index)) for layer, row in enumerate(scores) for index, value in enumerate(row.tolist())
    ]
    return [head for _, head in sorted(scored)]


def score_taylor(model: GPT, windows: Tensor, batch_size: int) -> list[Tensor]:
    """First-order cost of removing each head (Michel et al. 2019, equation 2), (H,) float64 per layer.

    The mean over the windows (N, T + 1) of |d loss / d m|, where m = 1 multiplies the output of the head and the loss
    is the window's mean; the scores of a layer are divided by their Euclidean norm.
    """
    device = model.wte.weight.device
    scores = [torch.zeros(n_head, dtype=torch.float64) for n_head in model.config.layer_heads]
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        # One mask per window, since the absolute value is taken per window.
        masks = [torch.ones(len(batch), 1, len(score), device=device, requires_grad=True) for score in scores]
        with torch.enable_grad(), mask_heads(model, masks):
            loss = len(batch) * model(batch[:, :-1], batch[:, 1:])
        for score, gradient in zip(scores, torch.autograd.grad(loss, masks), strict=True):
            score += gradient.abs().sum((0, 1)).double().cpu()
    return [score / score.norm().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]


@torch.no_grad()
def score_magnitude(model: GPT) -> list[Tensor]:
    """Euclidean norm of the weights of each head, its rows of c_attn and columns of c_proj, (H,) per layer."""
    scores = []
    for block in model.h:
        n_head, head_dim = block.attn.n_head, block.attn.head_dim
        rows = block.attn.c_attn.weight.double().view(3, n_head, head_dim, -1)
        columns = block.attn.c_proj.weight.double().view(-1, n_head, head_dim)
        scores.append((rows.square().sum((0, 2, 3)) + columns.square().sum((0, 2))).sqrt().cpu())
    return scores


def make_masks(model: GPT, removed: Iterable[Head] = ()) -> list[Tensor]:
    """One mask (H,) per layer for mask_heads, 0 for the removed heads and 1 for all others."""
    masks = [torch.ones(n_head, device=model.wte.weight.device) for n_head in model.config.layer_heads]
    for head in removed:
        masks[head.layer][head.index] = 0
    return masks


@contextmanager
def mask_heads(model: GPT, masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the output of each head by its mask while the context is open.

    masks: one tensor per layer, (H,) for all sequences or (B, 1, H) for one mask per sequence.
    """
    hooks = []
    for block, mask in zip(model.h, masks, strict=True):

        def scale(module, args, mask=mask, shape=(block.attn.n_head, block.attn.head_dim)) -> Tensor:
            return (args[0].unflatten(-1, shape) * mask.unsqueeze(-1)).flatten(-2)

        hooks.append(block.attn.c_proj.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
