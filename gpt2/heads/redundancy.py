"""Which heads repeat others of their layer: pairs, clusters, and the tables and figures made of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gpt2.heads.similarity import NULLS, list_heads
from gpt2.model.config import GPTConfig
from gpt2.pipeline.files import UserError

DIGITS = 6
# The matrix that each cosine of a Pair is read from.
COSINES = {
    "similarity": "pattern",
    "nosink": "pattern_nosink",
    **{name: name for name in ("output", "written", "qk", "ov")},
    "untrained": "untrained_pattern",
    "untrained_nosink": "untrained_pattern_nosink",
    "shuffled": "shuffled_pattern",
    "shuffled_nosink": "shuffled_pattern_nosink",
    "untrained_qk": "untrained_qk",
    "untrained_ov": "untrained_ov",
}


class Pair(NamedTuple):
    """Two heads of one layer and the cosines between them, in the order of COSINES: a row of pairs.csv."""

    layer: int
    head_a: int
    head_b: int
    similarity: float
    nosink: float
    output: float
    written: float
    qk: float
    ov: float
    untrained: float
    untrained_nosink: float
    shuffled: float
    shuffled_nosink: float
    untrained_qk: float
    untrained_ov: float


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
    mean_qk: float
    max_qk: float
    mean_ov: float
    max_ov: float
    untrained_mean: float
    untrained_max: float
    untrained_redundant_pairs: int
    shuffled_mean: float
    shuffled_max: float
    shuffled_redundant_pairs: int
    # Above the threshold that is calibrated on the null model over all layers.
    pairs_above_untrained_threshold: int
    pairs_above_shuffled_threshold: int


def list_pairs(config: GPTConfig, matrices: Mapping[str, np.ndarray]) -> list[Pair]:
    """All pairs of heads of the same layer, those with the most similar patterns first.

    matrices: those that COSINES names, each (M, M). Raises UserError if no layer has two heads.
    """
    heads = list_heads(config)
    pairs = [
        Pair(a.layer, a.index, b.index, *(float(matrices[name][i, j]) for name in COSINES.values()))
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


def calibrate_threshold(pairs: Sequence[Pair], null: str, percentile: float) -> float:
    """The cosine below which `percentile` percent of the same-layer pairs of a null model lie.

    If the trained model's pairs were no more alike than the null's, 100 - percentile percent of them would be expected
    above it. The rule supposes no shape of the distribution. It is no p-value: pairs that share a head are dependent.

    null: the field of Pair with the null model's cosines.
    """
    return float(np.percentile([getattr(pair, null) for pair in pairs], percentile))


def summarise_layers(pairs: Sequence[Pair], threshold: float, null_percentile: float) -> list[LayerSummary]:
    """One row for each layer that has a pair, first layer first."""
    calibrated = {null: calibrate_threshold(pairs, null, null_percentile) for null in NULLS}
    rows = []
    for layer in sorted({pair.layer for pair in pairs}):
        here = [pair for pair in pairs if pair.layer == layer]
        clusters = cluster(_above(here, threshold))
        nulls: dict[str, Any] = {}
        for null in NULLS:
            nulls |= {
                f"{null}_mean": _mean(here, null),
                f"{null}_max": _max(here, null),
                f"{null}_redundant_pairs": len(_above(here, threshold, null)),
                f"pairs_above_{null}_threshold": len(_above(here, calibrated[null])),
            }
        rows.append(
            LayerSummary(
                layer=layer,
                max_similarity=_max(here, "similarity"),
                mean_similarity=_mean(here, "similarity"),
                redundant_pairs=len(_above(here, threshold)),
                redundant_heads=sum(map(len, clusters)),
                clusters=" ".join("+".join(map(str, members)) for members in clusters),
                mean_nosink=_mean(here, "nosink"),
                mean_output=_mean(here, "output"),
                mean_written=_mean(here, "written"),
                mean_qk=_mean(here, "qk"),
                max_qk=_max(here, "qk"),
                mean_ov=_mean(here, "ov"),
                max_ov=_max(here, "ov"),
                **nulls,
            )
        )
    return rows


def summarise_pairs(
    config: GPTConfig, pairs: Sequence[Pair], threshold: float, null_percentile: float
) -> dict[str, float]:
    """Figures of metrics/heads.json; means and maxima run over the pairs of heads of the same layer.

    redundant_pairs_middle_percent: share of the redundant pairs that lie in `middle_layers`, 0 if there are none; to be
    held against middle_layers_percent, the share of those layers in all. pairs_above_*_threshold: pairs of the trained
    model above the threshold that is calibrated on a null model. *_rank_correlation: whether the pairs that are alike
    are the same ones, of the patterns on shuffled tokens, in W_QK and, for what the heads write, in W_OV.
    """
    redundant = _above(pairs, threshold)
    middle = middle_layers(config.n_layer)
    in_middle = sum(pair.layer in middle for pair in redundant)
    clusters = [
        members
        for layer in range(config.n_layer)
        for members in cluster([pair for pair in redundant if pair.layer == layer])
    ]
    alike = {
        "shuffled": ("similarity", "shuffled"),
        "qk": ("similarity", "qk"),
        "ov": ("written", "ov"),
    }
    figures = {
        "heads": len(list_heads(config)),
        "threshold": threshold,
        "null_percentile": null_percentile,
        "same_layer_pairs": len(pairs),
        "redundant_pairs": len(redundant),
        "redundant_pairs_nosink": len(_above(pairs, threshold, "nosink")),
        "redundant_pairs_middle_percent": _round(100 * in_middle / max(1, len(redundant))),
        "middle_layers_percent": _round(100 * len(middle) / config.n_layer),
        "redundant_heads": sum(map(len, clusters)),
        "redundant_clusters": len(clusters),
        "largest_cluster": max(map(len, clusters), default=0),
        **{
            f"{name}_rank_correlation": _round(correlate_similarities(pairs, *fields)) for name, fields in alike.items()
        },
    }
    for kind, of in _STATISTICS.items():
        figures |= {f"{kind}_similarity": of(pairs, "similarity"), f"{kind}_similarity_nosink": of(pairs, "nosink")}
        figures |= {f"{kind}_{name}_similarity": of(pairs, name) for name in ("output", "written", "qk", "ov")}
        figures |= {f"untrained_{kind}_{name}_similarity": of(pairs, f"untrained_{name}") for name in ("qk", "ov")}
    for null in NULLS:
        for end, trained in (("", "similarity"), ("_nosink", "nosink")):
            calibrated = calibrate_threshold(pairs, null + end, null_percentile)
            figures |= {
                f"{null}_redundant_pairs{end}": len(_above(pairs, threshold, null + end)),
                f"{null}_max_similarity{end}": _max(pairs, null + end),
                f"{null}_mean_similarity{end}": _mean(pairs, null + end),
                f"{null}_threshold{end}": _round(calibrated),
                f"pairs_above_{null}_threshold{end}": len(_above(pairs, calibrated, trained)),
            }
    return figures


def correlate_similarities(pairs: Sequence[Pair], first: str, second: str) -> float:
    """Spearman's rank correlation over pairs of two of their cosines; 0 where one does not vary."""
    a, b = (pd.Series([getattr(pair, field) for pair in pairs]).rank().to_numpy() for field in (first, second))
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def tabulate_matrix(config: GPTConfig, matrix: np.ndarray) -> tuple[list[str], list[list]]:
    """Columns and rows of the wide table of a matrix (M, M), both named like l0h0."""
    names = [f"l{head.layer}h{head.index}" for head in list_heads(config)]
    rows = [[name, *(_round(value) for value in row)] for name, row in zip(names, matrix.tolist(), strict=True)]
    return ["head", *names], rows


def tabulate_pairs(pairs: Sequence[Pair]) -> list[list]:
    """Rows of pairs.csv, under the fields of Pair."""
    return [[*pair[:3], *map(_round, pair[3:])] for pair in pairs]


def _above(pairs: Sequence[Pair], threshold: float, field: str = "similarity") -> list[Pair]:
    return [pair for pair in pairs if getattr(pair, field) > threshold]


def _mean(pairs: Sequence[Pair], field: str) -> float:
    return _round(sum(getattr(pair, field) for pair in pairs) / len(pairs))


def _max(pairs: Sequence[Pair], field: str) -> float:
    return _round(max(getattr(pair, field) for pair in pairs))


_STATISTICS = {"mean": _mean, "max": _max}


def _round(value: float) -> float:
    return round(value, DIGITS)
