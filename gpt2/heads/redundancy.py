"""Redundant heads: pairs of heads of one layer, their clusters, and statistics of both."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr

from gpt2.heads.similarity import NULLS, list_heads
from gpt2.model.config import GPTConfig
from gpt2.pipeline.files import UserError

DIGITS = 6
# For each cosine of a pair, the matrix that it is read from, and the metric of its mean and maximum over pairs.
COSINES = {
    "similarity": ("pattern", "{}_similarity"),
    "nosink": ("pattern_nosink", "{}_similarity_nosink"),
    "centred": ("pattern_centred", "{}_centred_similarity"),
    "output": ("output", "{}_output_similarity"),
    "written": ("written", "{}_written_similarity"),
    "qk": ("qk", "{}_qk_similarity"),
    "ov": ("ov", "{}_ov_similarity"),
    "untrained": ("untrained_pattern", "untrained_{}_similarity"),
    "untrained_nosink": ("untrained_pattern_nosink", "untrained_{}_similarity_nosink"),
    "untrained_centred": ("untrained_pattern_centred", "untrained_{}_centred_similarity"),
    "shuffled": ("shuffled_pattern", "shuffled_{}_similarity"),
    "shuffled_nosink": ("shuffled_pattern_nosink", "shuffled_{}_similarity_nosink"),
    "shuffled_centred": ("shuffled_pattern_centred", "shuffled_{}_centred_similarity"),
    "untrained_qk": ("untrained_qk", "untrained_{}_qk_similarity"),
    "untrained_ov": ("untrained_ov", "untrained_{}_ov_similarity"),
}


def list_pairs(config: GPTConfig, matrices: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """All pairs of heads of the same layer: `layer`, `head_a`, `head_b` and the COSINES, most similar patterns first.

    matrices: those that COSINES names, each (M, M). Raises UserError if no layer has two heads.
    """
    heads = pd.DataFrame(list_heads(config), columns=["layer", "head"])
    layer, head = heads["layer"].to_numpy(), heads["head"].to_numpy()
    a, b = np.nonzero(np.triu(layer[:, None] == layer, 1))
    if not len(a):
        raise UserError(f"model.n_head={config.n_head}: no layer has two heads to compare; set it to 2 or more")
    cosines = {column: matrices[matrix][a, b] for column, (matrix, _) in COSINES.items()}
    pairs = pd.DataFrame({"layer": layer[a], "head_a": head[a], "head_b": head[b], **cosines})
    # Pairs are listed by layer and heads, an order that a stable sort keeps among equal cosines.
    return pairs.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


def find_clusters(pairs: pd.DataFrame) -> pd.DataFrame:
    """Heads of one layer that `pairs` connect, directly or through others; one row for each such cluster.

    Columns: layer, heads (how many) and members (their numbers, joined by +), sorted by layer and first member.
    """
    ends = np.concatenate([pairs[["layer", end]].to_numpy(int) for end in ("head_a", "head_b")])
    heads, places = np.unique(ends, axis=0, return_inverse=True)
    edges = (np.ones(len(pairs)), places.reshape(2, -1))
    _, labels = connected_components(coo_array(edges, shape=(len(heads), len(heads))), directed=False)
    members = pd.DataFrame({"layer": heads[:, 0], "head": heads[:, 1].astype(str)}).groupby(labels)
    return members.agg(layer=("layer", "first"), heads=("head", "size"), members=("head", "+".join))


def middle_layers(n_layer: int) -> range:
    """All layers except the first and the last n_layer // 4: 3 to 8 of 12, 1 and 2 of 4."""
    return range(n_layer // 4, n_layer - n_layer // 4)


def calibrate_threshold(pairs: pd.DataFrame, null: str, percentile: float) -> float:
    """The `percentile` of a null model's cosines, column `null`, over all pairs of heads of the same layer.

    If the trained model's pairs were no more similar than the null's, 100 - percentile percent of them would be
    expected above it. The rule assumes no shape of the distribution. It is no p-value: pairs that share a head are
    dependent.
    """
    return float(np.percentile(pairs[null], percentile))


def summarise_layers(pairs: pd.DataFrame, threshold: float, null_percentile: float) -> pd.DataFrame:
    """Statistics over the pairs of each layer that has one, first layer first.

    clusters: those of redundant heads, separated by a space. Calibrated thresholds are over all layers.
    """
    above = {
        "redundant_pairs": pairs["similarity"] > threshold,
        "untrained_redundant_pairs": pairs["untrained"] > threshold,
        "shuffled_redundant_pairs": pairs["shuffled"] > threshold,
        **{
            f"pairs_above_{null}_threshold": pairs["similarity"] > calibrate_threshold(pairs, null, null_percentile)
            for null in NULLS
        },
    }
    layers = pairs.assign(**above).groupby("layer").agg(
        max_similarity=("similarity", "max"),
        mean_similarity=("similarity", "mean"),
        **{f"mean_{name}": (name, "mean") for name in ("nosink", "centred", "output", "written", "qk", "ov")},
        **{f"max_{name}": (name, "max") for name in ("qk", "ov")},
        **{f"{null}_{statistic}": (null, statistic) for null in NULLS for statistic in ("mean", "max")},
        **{f"{null}_mean_centred": (f"{null}_centred", "mean") for null in NULLS},
        **{name: (name, "sum") for name in above},
    )  # fmt: skip
    clusters = find_clusters(pairs[above["redundant_pairs"]]).groupby("layer")
    layers = layers.join(clusters.agg(redundant_heads=("heads", "sum"), clusters=("members", " ".join)))
    return layers.fillna({"redundant_heads": 0, "clusters": ""}).astype({"redundant_heads": int}).reset_index()


def summarise_pairs(
    config: GPTConfig, pairs: pd.DataFrame, threshold: float, null_percentile: float
) -> dict[str, float]:
    """Metrics over all pairs of heads of the same layer.

    redundant_pairs_middle_percent: share of the redundant pairs in `middle_layers`, 0 if there are none; compare it
    with middle_layers_percent, the share of those layers in all. pairs_above_*_threshold: pairs of the trained model
    above the threshold calibrated on a null model, in the same kind of cosine. *_rank_correlation: Spearman's
    correlation over pairs, of patterns with those on shuffled tokens and with W_QK, and of what heads write with W_OV.
    """
    redundant, middle = pairs[pairs["similarity"] > threshold], middle_layers(config.n_layer)
    sizes = find_clusters(redundant)["heads"]
    figures = {
        "heads": len(list_heads(config)),
        "threshold": threshold,
        "null_percentile": null_percentile,
        "same_layer_pairs": len(pairs),
        "redundant_pairs": len(redundant),
        "redundant_pairs_nosink": _count_above(pairs["nosink"], threshold),
        "redundant_pairs_middle_percent": 100 * redundant["layer"].isin(middle).sum() / max(1, len(redundant)),
        "middle_layers_percent": 100 * len(middle) / config.n_layer,
        "redundant_heads": int(sizes.sum()),
        "redundant_clusters": len(sizes),
        "largest_cluster": max(sizes, default=0),
        "shuffled_rank_correlation": correlate_ranks(pairs["similarity"], pairs["shuffled"]),
        "qk_rank_correlation": correlate_ranks(pairs["similarity"], pairs["qk"]),
        "ov_rank_correlation": correlate_ranks(pairs["written"], pairs["ov"]),
    }
    for column, (_, metric) in COSINES.items():
        figures |= {metric.format(statistic): pairs[column].agg(statistic) for statistic in ("mean", "max")}
    for null in NULLS:
        figures[f"{null}_redundant_pairs"] = _count_above(pairs[null], threshold)
        figures[f"{null}_redundant_pairs_nosink"] = _count_above(pairs[f"{null}_nosink"], threshold)
        for trained, column, metric in (
            ("similarity", null, "threshold"),
            ("nosink", f"{null}_nosink", "threshold_nosink"),
            ("centred", f"{null}_centred", "centred_threshold"),
        ):
            calibrated = calibrate_threshold(pairs, column, null_percentile)
            figures[f"{null}_{metric}"] = calibrated
            figures[f"pairs_above_{null}_{metric}"] = _count_above(pairs[trained], calibrated)
        above = figures[f"pairs_above_{null}_centred_threshold"]
        figures[f"pairs_above_{null}_centred_threshold_percent"] = 100 * above / len(pairs)
    return {name: round(value, DIGITS) for name, value in figures.items()}


def correlate_ranks(first: pd.Series, second: pd.Series) -> float:
    """Spearman's rank correlation; 0 if a column is constant, where it is undefined."""
    return float(spearmanr(first, second).statistic) if min(first.nunique(), second.nunique()) > 1 else 0.0


def _count_above(cosines: pd.Series, threshold: float) -> int:
    return int((cosines > threshold).sum())
