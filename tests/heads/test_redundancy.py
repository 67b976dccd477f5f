"""Pairs, clusters and their statistics equal naive computations; thresholds calibrated on null models."""

import itertools
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from gpt2.heads.redundancy import (
    COSINES,
    correlate_ranks,
    find_clusters,
    list_pairs,
    middle_layers,
    summarise_layers,
    summarise_pairs,
)
from gpt2.model.config import GPTConfig
from gpt2.pipeline.files import UserError
from tests.analysed import make_model

NULLS = ("untrained", "shuffled")
MATRICES = {
    *("pattern", "pattern_nosink", "pattern_centred", "output", "written", "qk", "ov", "untrained_qk", "untrained_ov"),
    *(f"{null}_pattern{kind}" for null in NULLS for kind in ("", "_nosink", "_centred")),
}


def make_shape(heads: tuple[int, ...]) -> GPTConfig:
    shape = {"n_layer": len(heads), "n_head": 8, "n_embd": 32, "block_size": 8, "vocab_size": 97, "norm": "preln"}
    return GPTConfig(**shape, heads=heads)


def draw_matrices(n_heads: int) -> dict[str, np.ndarray]:
    """Random symmetric matrices with the numbers of COSINES."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.uniform(-1, 1, (n_heads, n_heads)) for name in sorted(MATRICES)}
    return {name: np.triu(matrix) + np.triu(matrix, 1).T for name, matrix in drawn.items()}


def pair_up(*ends: tuple[int, int], layer: int = 0, **cosines) -> pd.DataFrame:
    """Pairs of heads of a layer with cosine 0.25, of 0.9 in their patterns, except for `cosines`."""
    pairs = pd.DataFrame(ends, columns=["head_a", "head_b"]).assign(layer=layer)
    return pairs.assign(**{**dict.fromkeys(COSINES, 0.25), "similarity": 0.9, **cosines})


def test_pairs_are_of_one_layer_most_similar_first():
    shape, matrices = make_shape((4, 0, 3, 1)), draw_matrices(8)
    # Equal cosines: by layer and heads.
    matrices["pattern"][:4, :4] = 0.5
    pairs = list_pairs(shape, matrices)
    assert {matrix for matrix, _ in COSINES.values()} == MATRICES
    assert list(pairs) == ["layer", "head_a", "head_b", *COSINES]
    ends = list(zip(pairs["layer"], pairs["head_a"], pairs["head_b"], strict=True))
    assert set(ends) == {(layer, *two) for layer, n in ((0, 4), (2, 3)) for two in itertools.combinations(range(n), 2)}
    assert [-pairs["similarity"][i] for i in range(9)] == sorted(-pairs["similarity"])
    assert [end for end in ends if end[0] == 0] == sorted(end for end in ends if end[0] == 0)
    first = {0: 0, 2: 4}
    for row, (layer, a, b) in enumerate(ends):
        for column, (matrix, _) in COSINES.items():
            assert pairs[column][row] == matrices[matrix][first[layer] + a, first[layer] + b]


def test_refuses_to_pair_lone_heads():
    with pytest.raises(UserError, match=r"n_head=1.*set it to 2 or more"):
        list_pairs(make_model(n_head=1).config, draw_matrices(3))


def test_clusters_are_connected_components_of_each_layer():
    by_hand = find_clusters(pd.concat([pair_up((4, 10), (0, 1), (2, 3), (1, 3)), pair_up((1, 2), layer=2)]))
    assert by_hand.to_numpy().tolist() == [[0, 4, "0+1+2+3"], [0, 2, "4+10"], [2, 2, "1+2"]]
    assert find_clusters(pair_up().iloc[:0]).empty
    rng = np.random.default_rng(1)
    for n_pairs in range(1, 12):
        ends = np.unique(np.sort(np.stack([rng.choice(12, 2, replace=False) for _ in range(n_pairs)])), axis=0)
        linked = np.eye(12, dtype=int)
        linked[ends[:, 0], ends[:, 1]] = linked[ends[:, 1], ends[:, 0]] = 1
        reached = np.linalg.matrix_power(linked, 12) > 0
        expected = {tuple(row.nonzero()[0].tolist()) for row in reached if row.sum() > 1}
        members = find_clusters(pair_up(*ends.tolist()))["members"]
        assert members.tolist() == ["+".join(map(str, heads)) for heads in sorted(expected)]


def naive_figures(matrices: dict[str, np.ndarray], layers: list[int], threshold: float) -> dict[str, float]:
    """Means, maxima, counts and rank correlations over lists of numbers."""
    ends = [(i, j) for i, j in itertools.combinations(range(len(layers)), 2) if layers[i] == layers[j]]
    of = {name: [float(matrix[end]) for end in ends] for name, matrix in matrices.items()}

    def above(name: str, level: float) -> int:
        return sum(cosine > level for cosine in of[name])

    expected: dict[str, float] = {"same_layer_pairs": len(ends), "threshold": threshold, "null_percentile": 90}
    kinds = {"pattern": "similarity", "pattern_nosink": "similarity_nosink", "pattern_centred": "centred_similarity"}
    kinds |= {name: f"{name}_similarity" for name in ("output", "written", "qk", "ov")}
    for prefix, (matrix, metric) in itertools.product(("", "untrained_", "shuffled_"), kinds.items()):
        if cosines := of.get(prefix + matrix):
            expected |= {f"{prefix}mean_{metric}": fmean(cosines), f"{prefix}max_{metric}": max(cosines)}
    expected |= {"redundant_pairs": above("pattern", threshold)}
    expected |= {"redundant_pairs_nosink": above("pattern_nosink", threshold)}
    levels = {"pattern": "threshold", "pattern_nosink": "threshold_nosink", "pattern_centred": "centred_threshold"}
    for null in NULLS:
        expected[f"{null}_redundant_pairs"] = above(f"{null}_pattern", threshold)
        expected[f"{null}_redundant_pairs_nosink"] = above(f"{null}_pattern_nosink", threshold)
        for matrix, metric in levels.items():
            level = float(np.percentile(of[f"{null}_{matrix}"], 90))
            expected |= {f"{null}_{metric}": level, f"pairs_above_{null}_{metric}": above(matrix, level)}
        share = expected[f"pairs_above_{null}_centred_threshold"] / len(ends)
        expected[f"pairs_above_{null}_centred_threshold_percent"] = 100 * share
    alike = {"shuffled": ("pattern", "shuffled_pattern"), "qk": ("pattern", "qk"), "ov": ("written", "ov")}
    for name, (a, b) in alike.items():
        expected[f"{name}_rank_correlation"] = float(spearmanr(of[a], of[b]).statistic)
    return expected


# Counted by hand below.
COUNTED = {"heads", "redundant_heads", "redundant_clusters", "largest_cluster", "middle_layers_percent"}
COUNTED |= {"redundant_pairs_middle_percent"}


def test_figures_and_rows_equal_a_naive_computation():
    shape, matrices, layers = make_shape((6, 0, 5, 1)), draw_matrices(12), [0] * 6 + [2] * 5 + [3]
    pairs = list_pairs(shape, matrices)
    figures = summarise_pairs(shape, pairs, threshold=0.4, null_percentile=90)
    expected = naive_figures(matrices, layers, 0.4)
    assert {name: figures[name] for name in figures if name not in COUNTED} == pytest.approx(expected, abs=1e-6)
    assert set(figures) == COUNTED | set(expected)
    rows = summarise_layers(pairs, threshold=0.4, null_percentile=90)
    assert rows["layer"].tolist() == [0, 2]
    for layer, row in zip((0, 2), rows.to_dict("records"), strict=True):
        here = [i for i, place in enumerate(layers) if place == layer]
        of_layer = {name: matrix[np.ix_(here, here)] for name, matrix in matrices.items()}
        one = naive_figures(of_layer, [layer] * len(here), 0.4)
        for name in ("redundant_pairs", "untrained_redundant_pairs", "shuffled_redundant_pairs"):
            assert row[name] == one[name]
        assert row["mean_nosink"] == pytest.approx(one["mean_similarity_nosink"])
        for name in ("max_similarity", "mean_similarity"):
            assert row[name] == pytest.approx(one[name])
        for name in ("mean_centred", "mean_output", "mean_written", "mean_qk", "max_qk", "mean_ov", "max_ov"):
            assert row[name] == pytest.approx(one[f"{name}_similarity"])
        for null in NULLS:
            assert row[f"{null}_mean"] == pytest.approx(one[f"{null}_mean_similarity"])
            assert row[f"{null}_max"] == pytest.approx(one[f"{null}_max_similarity"])
            assert row[f"{null}_mean_centred"] == pytest.approx(one[f"{null}_mean_centred_similarity"])
    for null in NULLS:
        # The threshold of all layers, not of each.
        assert rows[f"pairs_above_{null}_threshold"].sum() == figures[f"pairs_above_{null}_threshold"]


def test_clusters_and_middle_layers_are_counted():
    pairs = pd.concat([
        pair_up((0, 1), (1, 2), layer=1),
        pair_up((2, 3), layer=3),
        pair_up((0, 1), layer=2, similarity=0.85),
        pair_up((0, 1), layer=0, similarity=0.1),
    ])  # fmt: skip
    figures = summarise_pairs(make_model(n_layer=4).config, pairs, threshold=0.85, null_percentile=95)
    # A cosine equal to the threshold is not above it.
    assert (figures["redundant_pairs"], figures["redundant_heads"]) == (3, 5)
    assert (figures["redundant_clusters"], figures["largest_cluster"], figures["heads"]) == (2, 3, 16)
    assert figures["redundant_pairs_middle_percent"] == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert figures["middle_layers_percent"] == 50
    rows = summarise_layers(pairs, threshold=0.85, null_percentile=95)
    assert rows["layer"].tolist() == [0, 1, 2, 3]
    assert rows["redundant_heads"].tolist() == [0, 3, 0, 2]
    assert rows["clusters"].tolist() == ["", "0+1+2", "", "2+3"]


def test_summary_without_redundant_pairs():
    pairs = pair_up((0, 1))
    figures = summarise_pairs(make_model().config, pairs, threshold=0.95, null_percentile=95)
    zero = ("redundant_pairs", "redundant_heads", "redundant_clusters", "largest_cluster")
    assert all(figures[name] == 0 for name in (*zero, "redundant_pairs_middle_percent", "qk_rank_correlation"))
    row = summarise_layers(pairs, threshold=0.95, null_percentile=95).iloc[0]
    assert (row["redundant_pairs"], row["redundant_heads"], row["clusters"]) == (0, 0, "")


@pytest.mark.parametrize("percentile", [90, 95, 99])
def test_a_model_that_is_its_own_null_has_the_rest_of_its_pairs_above(percentile):
    ends = list(itertools.combinations(range(40), 2))
    cosines = np.random.default_rng(0).random(len(ends))
    own = {name: cosines for name in ("similarity", "shuffled", "centred", "untrained_centred")}
    figures = summarise_pairs(make_model().config, pair_up(*ends, **own), 0.85, percentile)
    assert abs(figures["pairs_above_shuffled_threshold"] - len(ends) * (100 - percentile) / 100) <= 1
    assert abs(figures["pairs_above_untrained_centred_threshold_percent"] - (100 - percentile)) <= 100 / len(ends)
    assert figures["shuffled_rank_correlation"] == 1


def test_rank_correlation_has_its_ends_and_is_zero_without_variation():
    x = pd.Series([0.1, 0.2, 0.4, 0.7])
    assert correlate_ranks(x, x**2) == pytest.approx(1)
    assert correlate_ranks(x, -(x**3)) == pytest.approx(-1)
    assert correlate_ranks(x, x * 0) == correlate_ranks(x[:1], x[:1]) == 0


@pytest.mark.parametrize(("n_layer", "middle"), [(12, range(3, 9)), (4, range(1, 3)), (2, range(2)), (1, range(1))])
def test_middle_is_symmetric(n_layer, middle):
    assert middle_layers(n_layer) == middle
