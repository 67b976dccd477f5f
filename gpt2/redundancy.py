"""Which heads repeat others of their layer: pairs, clusters, and the tables and figures made of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpt2.files import UserError
from gpt2.heads import MATRICES, list_heads
from gpt2.model import GPTConfig

DIGITS = 6


class Pair(NamedTuple):
    """Two heads of one layer and the cosines between them, in the order of MATRICES."""

    layer: int
    head_a: int
    head_b: int
    similarity: float
    nosink: float
    output: float
    written: float


class LayerSummary(NamedTuple):
    """Statistics over the pairs of heads of one layer: a row of layers.csv."""

    layer: int
    max_similarity: float
    mean_similarity: float
    redundant_pairs: int
    redundant_heads: int
    # Members joined by +, clusters by a space.
    clusters: str
    mean_nosink: float
    mean_output: float
    mean_written: float
    untrained_mean: float
    untrained_max: float
    untrained_redundant_pairs: int


def list_pairs(config: GPTConfig, matrices: Mapping[str, np.ndarray]) -> list[Pair]:
    """All pairs of heads of the same layer, those with the most similar patterns first.

    matrices: what compare_heads returned. Raises UserError if no layer has two heads.
    """
    heads = list_heads(config)
    pairs = [
        Pair(a.layer, a.index, b.index, *(float(matrices[name][i, j]) for name in MATRICES))
        for i, a in enumerate(heads)
        for j, b in enumerate(heads)
        if a.layer == b.layer and a.index < b.index
    ]
    if not pairs:
        raise UserError(f"model.n_head={config.n_head}: no layer has two heads to compare; set it to 2 or more")
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.layer, pair.head_a, pair.head_b))


def cluster(pairs: Sequence[Pair]) -> list[list[int]]:
    """Heads of one layer that `pairs` link, directly or through others; members and clusters sorted."""
    clusters: list[set[int]] = []
    for pair in pairs:
        ends = {pair.head_a, pair.head_b}
        joined = ends.union(*(members for members in clusters if members & ends))
        clusters = [members for members in clusters if not members & ends] + [joined]
    return sorted(sorted(members) for members in clusters)


def middle_layers(n_layer: int) -> range:
    """The layers but the first and the last n_layer // 4: 3 to 8 of 12, 1 and 2 of 4."""
    return range(n_layer // 4, n_layer - n_layer // 4)


def summarise_layers(pairs: Sequence[Pair], untrained: Sequence[Pair], threshold: float) -> list[LayerSummary]:
    """One row for each layer that has a pair, first layer first."""
    rows = []
    for layer in sorted({pair.layer for pair in pairs}):
        here = [pair for pair in pairs if pair.layer == layer]
        null = [pair for pair in untrained if pair.layer == layer]
        clusters = cluster(_above(here, threshold))
        rows.append(
            LayerSummary(
                layer=layer,
                max_similarity=_round(max(pair.similarity for pair in here)),
                mean_similarity=_mean(here, "similarity"),
                redundant_pairs=len(_above(here, threshold)),
                redundant_heads=sum(map(len, clusters)),
                clusters=" ".join("+".join(map(str, members)) for members in clusters),
                mean_nosink=_mean(here, "nosink"),
                mean_output=_mean(here, "output"),
                mean_written=_mean(here, "written"),
                untrained_mean=_mean(null, "similarity"),
                untrained_max=_round(max(pair.similarity for pair in null)),
                untrained_redundant_pairs=len(_above(null, threshold)),
            )
        )
    return rows


def summarise(
    config: GPTConfig, pairs: Sequence[Pair], untrained: Sequence[Pair], threshold: float
) -> dict[str, float]:
    """Figures of metrics/heads.json; means and maxima run over the pairs of heads of the same layer.

    redundant_pairs_middle_percent: share of the redundant pairs that lie in `middle_layers`, 0 if there are none; to be
    held against middle_layers_percent, the share of those layers in all.
    """
    redundant = _above(pairs, threshold)
    middle = middle_layers(config.n_layer)
    in_middle = sum(pair.layer in middle for pair in redundant)
    clusters = [
        members
        for layer in range(config.n_layer)
        for members in cluster([pair for pair in redundant if pair.layer == layer])
    ]
    return {
        "heads": len(list_heads(config)),
        "threshold": threshold,
        "same_layer_pairs": len(pairs),
        "redundant_pairs": len(redundant),
        "redundant_pairs_nosink": sum(pair.nosink > threshold for pair in pairs),
        "redundant_pairs_middle_percent": _round(100 * in_middle / max(1, len(redundant))),
        "middle_layers_percent": _round(100 * len(middle) / config.n_layer),
        "redundant_heads": sum(map(len, clusters)),
        "redundant_clusters": len(clusters),
        "largest_cluster": max(map(len, clusters), default=0),
        "max_similarity": _round(max(pair.similarity for pair in pairs)),
        "mean_similarity": _mean(pairs, "similarity"),
        "mean_similarity_nosink": _mean(pairs, "nosink"),
        "mean_output_similarity": _mean(pairs, "output"),
        "mean_written_similarity": _mean(pairs, "written"),
        "untrained_redundant_pairs": len(_above(untrained, threshold)),
        "untrained_max_similarity": _round(max(pair.similarity for pair in untrained)),
        "untrained_mean_similarity": _mean(untrained, "similarity"),
        "untrained_mean_similarity_nosink": _mean(untrained, "nosink"),
    }


def tabulate_matrix(config: GPTConfig, matrix: np.ndarray) -> tuple[list[str], list[list]]:
    """Columns and rows of the wide table of a matrix (M, M), both named like l0h0."""
    names = [f"l{head.layer}h{head.index}" for head in list_heads(config)]
    rows = [[name, *(_round(value) for value in row)] for name, row in zip(names, matrix.tolist(), strict=True)]
    return ["head", *names], rows


def tabulate_pairs(pairs: Sequence[Pair]) -> list[list]:
    """Rows of pairs.csv, under the fields of Pair."""
    return [[*pair[:3], *map(_round, pair[3:])] for pair in pairs]


def _above(pairs: Sequence[Pair], threshold: float) -> list[Pair]:
    return [pair for pair in pairs if pair.similarity > threshold]


def _mean(pairs: Sequence[Pair], field: str) -> float:
    return _round(sum(getattr(pair, field) for pair in pairs) / len(pairs))


def _round(value: float) -> float:
    return round(value, DIGITS)
