"""Redundancy rankings based on six similarity measures and four combinations of them.

Letters: M heads of all layers together, K = H D channels of the heads of a layer.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.gpt import GPT
from gpt2.prune.criteria import Order, most_similar_pair, order_by_redundancy, remove_one_by_one
from gpt2.prune.repair import Moments

# Of each, what order_by_redundancy is told of: the cosines of the patterns are the criterion `redundancy` itself.
ORDERED_SIMILARITIES = ("pattern_nosink", "output", "written", "qk", "ov")
COMBINATIONS = ("pattern_in_layer", "circuits", "written_taylor", "written_distinct")
# In the order of the report.
SIMILAR_ORDERS = (*ORDERED_SIMILARITIES, *COMBINATIONS)


def rank_by_similarity(
    model: GPT, similarities: Mapping[str, np.ndarray], taylor: Sequence[Tensor], moments: Sequence[Moments]
) -> dict[str, Order]:
    """An order for each of SIMILAR_ORDERS.

    pattern_in_layer: of the patterns' cosines, how far each lies above the mean of its layer, in standard deviations.
    circuits: the mean of the cosines of W_QK and of W_OV, alike in what a head looks for and in what it does with it.
    written_taylor: of the two heads that write what is most alike, the one of lower Taylor score goes.
    written_distinct: the head goes that writes least beside what its twin does; see order_by_distinct.

    similarities (M, M) each are what load_similarities returns, taylor what score_taylor does, moments the whole
    model's, of gather_moments.
    """
    heads = list_heads(model.config)
    written = similarities["written"]
    importance = np.array([taylor[head.layer][head.index].item() for head in heads])
    alike = {name: similarities[name] for name in ORDERED_SIMILARITIES} | {
        "pattern_in_layer": standardise_layers(similarities["pattern"], heads),
        "circuits": (similarities["qk"] + similarities["ov"]) / 2,
    }
    return {name: order_by_redundancy(matrix, heads) for name, matrix in alike.items()} | {
        "written_taylor": order_pairs_by_score(written, importance, heads),
        "written_distinct": order_by_distinct(written, written_sizes(model, moments), heads),
    }


def standardise_layers(similarity: np.ndarray, heads: Sequence[Head]) -> np.ndarray:
    """Similarity (M, M) less the mean of the pairs of the layer, over their deviation; 0 between layers.

    A layer whose pairs are all alike says nothing: 0.
    """
    layers = np.array([head.layer for head in heads])
    found = np.zeros_like(similarity)
    for layer in set(layers):
        here = np.flatnonzero(layers == layer)
        block = similarity[np.ix_(here, here)]
        pairs = block[np.triu_indices(len(here), 1)]
        if len(pairs) and np.ptp(pairs) > 0:
            found[np.ix_(here, here)] = (block - pairs.mean()) / pairs.std()
    return found


def order_pairs_by_score(similarity: np.ndarray, scores: np.ndarray, heads: Sequence[Head]) -> Order:
    """Of the most similar pair left within a layer, remove the head of the lower score (M,); of equals the later one.

    As in order_by_redundancy, the last heads of the layers follow by the same rule.
    """

    def pick(left: list[int]) -> int:
        return min(reversed(most_similar_pair(similarity, heads, left)), key=lambda place: scores[left[place]])

    return remove_one_by_one(heads, pick)


def order_by_distinct(similarity: np.ndarray, sizes: np.ndarray, heads: Sequence[Head]) -> Order:
    """Remove the head with the smallest part of what it writes that no multiple of its twin's writing makes up for.

    That is its size (M,) times the sine to its twin, the most similar head left in its layer. The last head of a layer
    has none.
    """

    def distinct(i: int, left: list[int]) -> float:
        cosines = [similarity[i, j] for j in left if heads[j].layer == heads[i].layer and j != i]
        return sizes[i] * math.sqrt(1 - max(map(abs, cosines), default=0.0) ** 2)

    def pick(left: list[int]) -> int:
        return min(range(len(left)), key=lambda place: distinct(left[place], left))

    return remove_one_by_one(heads, pick)


def written_sizes(model: GPT, moments: Sequence[Moments]) -> np.ndarray:
    """Root mean square (M,) of what each head adds to the residual stream over the calibration tokens."""
    sizes = []
    for block, (mean, covariance) in zip(model.h, moments, strict=True):
        D = block.attn.head_dim
        squares = covariance + mean.outer(mean)
        columns = block.attn.c_proj.weight.detach().double()
        for start in range(0, block.attn.n_head * D, D):
            own = slice(start, start + D)
            sizes.append((columns[:, own] @ squares[own, own] * columns[:, own]).sum().clamp(min=0).sqrt().item())
    return np.array(sizes)
