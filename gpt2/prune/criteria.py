"""In which order to remove the heads of a model, the first to go first: criteria that look at the whole model once.

iterative.py has those that look at it again, similarity_orders.py other uses of similarity.

Letters: B sequences, T tokens, C channels, H heads of a layer, D channels of a head, M heads of all layers together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.gpt import GPT

Order = list[Head]
ONE_SHOT = ("redundancy", "taylor", "magnitude", "random")


def rank_heads(
    model: GPT, similarity: np.ndarray, taylor: Sequence[Tensor], seeds: Sequence[int]
) -> dict[str, list[Order]]:
    """The orders of each of ONE_SHOT: one each, for random one a seed.

    similarity (M, M) are the cosines of the attention patterns; taylor is what score_taylor returned.
    """
    heads = list_heads(model.config)
    return {
        "redundancy": [order_by_redundancy(similarity, heads)],
        "taylor": [order_by_score(taylor)],
        "magnitude": [order_by_score(score_magnitude(model))],
        "random": [order_at_random(heads, seed) for seed in seeds],
    }


def order_by_redundancy(similarity: np.ndarray, heads: Sequence[Head]) -> Order:
    """Of the most similar pair left within a layer, remove the head that is more like the others of the layer.

    "More like" is the higher mean similarity to the heads left in the layer; of two equals the later one goes. When
    each layer is down to one head, the rest follow by the same rule without regard to layers.
    """

    def pick(left: list[int]) -> int:
        pair, comparable = most_similar_pair(similarity, heads, left), _comparable(heads, left)
        alike = [similarity[left[place], left][comparable[place]].mean() for place in pair]
        return pair[0] if alike[0] > alike[1] else pair[1]

    return remove_one_by_one(heads, pick)


def remove_one_by_one(heads: Sequence[Head], pick: Callable[[list[int]], int]) -> Order:
    """The order in which heads go, of which one stays last. `pick` is given those left, as numbers, and tells a place
    among them."""
    left, order = list(range(len(heads))), []
    while len(left) > 1:
        order.append(heads[left.pop(pick(left))])
    return order + [heads[last] for last in left]


def most_similar_pair(similarity: np.ndarray, heads: Sequence[Head], left: Sequence[int]) -> tuple[int, int]:
    """Places in `left`, ascending, of the two most similar heads; of one layer as long as two of one layer are left.

    left: which of `heads` there still are, as numbers.
    """
    cosines, comparable = similarity[np.ix_(left, left)], _comparable(heads, left)
    first, second = np.unravel_index(np.argmax(np.where(comparable, cosines, -np.inf)), cosines.shape)
    return int(first), int(second)


def _comparable(heads: Sequence[Head], left: Sequence[int]) -> np.ndarray:
    """Which pairs of those left are compared (n, n): two of one layer or, where there are none, any two."""
    layers, others = np.array([heads[i].layer for i in left]), ~np.eye(len(left), dtype=bool)
    within = (layers[:, None] == layers) & others
    return within if within.any() else others


def order_at_random(heads: Sequence[Head], seed: int) -> Order:
    """A permutation of the heads that `seed` alone decides."""
    return [heads[i] for i in np.random.Generator(np.random.PCG64([seed])).permutation(len(heads))]


def order_by_score(scores: Sequence[Tensor]) -> Order:
    """Lowest score first, equal ones by position; scores are one tensor (H,) a layer."""
    scored = [
        (value, Head(layer, index)) for layer, row in enumerate(scores) for index, value in enumerate(row.tolist())
    ]
    return [head for _, head in sorted(scored)]


def score_taylor(model: GPT, windows: Tensor, batch_size: int) -> list[Tensor]:
    """What removing a head would cost to first order (Michel et al. 2019, equation 2), (H,) float64 a layer.

    The mean over the windows (N, T + 1) of |d loss / d m|, where m = 1 multiplies the output of the head and the loss
    is the window's mean; then each layer is divided by its Euclidean norm, as there.
    """
    device = model.wte.weight.device
    scores = [torch.zeros(n_head, dtype=torch.float64) for n_head in model.config.layer_heads]
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        # A mask for each window, since the absolute value is taken window by window.
        masks = [torch.ones(len(batch), 1, len(score), device=device, requires_grad=True) for score in scores]
        with torch.enable_grad(), mask_heads(model, masks):
            loss = len(batch) * model(batch[:, :-1], batch[:, 1:])
        for score, gradient in zip(scores, torch.autograd.grad(loss, masks), strict=True):
            score += gradient.abs().sum((0, 1)).double().cpu()
    return [score / score.norm().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]


@torch.no_grad()
def score_magnitude(model: GPT) -> list[Tensor]:
    """Euclidean norm of the weights that belong to a head, its rows of c_attn and columns of c_proj, (H,) a layer."""
    scores = []
    for block in model.h:
        n_head, head_dim = block.attn.n_head, block.attn.head_dim
        rows = block.attn.c_attn.weight.double().view(3, n_head, head_dim, -1)
        columns = block.attn.c_proj.weight.double().view(-1, n_head, head_dim)
        scores.append((rows.square().sum((0, 2, 3)) + columns.square().sum((0, 2))).sqrt().cpu())
    return scores


@contextmanager
def mask_heads(model: GPT, masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the output of each head by its mask inside the block.

    masks: one tensor a layer, (H,) for all tokens alike or (B, 1, H) for each sequence its own.
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
