"""What each head costs alone, and rank correlations with intervals."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from gpt2.heads.similarity import list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune.criteria import COST_SIMILARITIES, score_taylor
from gpt2.prune.remove import remove_heads
from gpt2.prune.single_heads import COST_PREDICTORS, HeadCost, correlate_costs, cost_each_head, holm
from tests.analysed import NORMS, make_evaluator, make_model, make_windows


def make_costs(n: int, noise: float, seed: int = 0) -> list[HeadCost]:
    """Heads whose loss rises with their Taylor score, up to noise, and falls with their similarity."""
    rng = np.random.default_rng(seed)
    rises = rng.permutation(n) / n
    return [
        HeadCost(0, i, *[float(-rise)] * len(COST_SIMILARITIES), float(rise + noise * rng.normal()), float(rise))
        for i, rise in enumerate(rises)
    ]


def cost_heads(model, similarities, windows) -> tuple[list[HeadCost], list[torch.Tensor]]:
    """Costs on the windows, and the Taylor scores there."""
    taylor = score_taylor(model, windows, 4)
    return cost_each_head(make_evaluator(model, windows), list_heads(model.config), similarities, taylor), taylor


@pytest.mark.parametrize("norm", NORMS)
def test_each_head_is_removed_alone(norm):
    model, windows = make_model(norm), make_windows(6)
    heads, rng = list_heads(model.config), np.random.default_rng(0)
    similarities = {matrix: rng.random((12, 12)) for matrix in COST_SIMILARITIES.values()}
    costs, taylor = cost_heads(model, similarities, windows)
    assert [(cost.layer, cost.head) for cost in costs] == heads
    for i, cost in enumerate(costs):
        rise = mean_loss(remove_heads(model, [heads[i]]), windows, 4) - mean_loss(model, windows, 4)
        assert cost.loss_rise == pytest.approx(rise, abs=1e-6)
        assert cost.taylor == pytest.approx(taylor[cost.layer][cost.head].item(), abs=1e-6)
        # Of the four heads of its layer, itself left out.
        first = i // 4 * 4
        for name, matrix in COST_SIMILARITIES.items():
            others = [similarities[matrix][i, j] for j in range(first, first + 4) if j != i]
            assert getattr(cost, name) == pytest.approx(max(others), abs=1e-6)


def test_the_similarity_of_another_layer_does_not_count():
    similarity = np.kron(np.eye(3), np.full((4, 4), 0.25)) + 0.9 * (1 - np.kron(np.eye(3), np.ones((4, 4))))
    costs, _ = cost_heads(make_model(), dict.fromkeys(COST_SIMILARITIES.values(), similarity), make_windows(2))
    assert {getattr(cost, name) for cost in costs for name in COST_SIMILARITIES} == {0.25}


def test_correlations_are_spearmans():
    costs = make_costs(32, noise=0.3)
    figures = correlate_costs(costs)
    assert figures["similarity_rank_correlation"] == -1
    expected = spearmanr([cost.taylor for cost in costs], [cost.loss_rise for cost in costs]).statistic
    assert figures["taylor_rank_correlation"] == pytest.approx(expected, abs=1e-6)
    assert figures["similarity_rank_correlation_low"] == figures["similarity_rank_correlation_high"] == -1
    kinds = [f"{name}_rank_correlation{place}" for name in COST_PREDICTORS for place in ("", "_in_layer")]
    assert figures.keys() == {f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high", "_p")}


def test_holm_adjusts_as_published():
    # Smallest times 4, next times 3, and so on, never below one before.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.9, 0.5])) == pytest.approx([1, 1])


def test_p_values_follow_the_expected_direction_and_agree_with_scipy():
    costs = make_costs(32, noise=0.6)
    figures = correlate_costs(costs)
    # All similarities have the correlation -1, the smallest p value that 9,999 permutations give, times 14 tests.
    assert figures["similarity_rank_correlation_p"] == pytest.approx(14e-4)
    opposite = correlate_costs([cost._replace(similarity=-cost.similarity) for cost in costs])
    assert opposite["similarity_rank_correlation_p"] == 1
    weak = make_costs(32, noise=1.0, seed=3)
    weak = [cost._replace(**dict.fromkeys(COST_SIMILARITIES, 0.5)) for cost in weak]
    expected = spearmanr([c.taylor for c in weak], [c.loss_rise for c in weak], alternative="greater").pvalue
    found = correlate_costs(weak)["taylor_rank_correlation_p"]
    # The two kinds of test agree, in one layer; Holm takes the smallest times 14, and the next at least as much.
    assert 14 * 0.5 * expected < found < max(14e-4, 14 * 2 * expected) + 0.01 or found == 1


def test_unrelated_predictors_are_rarely_significant():
    significant = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        costs = [HeadCost(i // 8, i % 8, *rng.normal(size=8).tolist()) for i in range(32)]
        significant += min(value for key, value in correlate_costs(costs).items() if key.endswith("_p")) < 0.05
    # At most 5 % of families; a single test of each at 5 % would reject in half of them.
    assert significant <= 2


def test_a_predictor_of_the_layer_alone_does_not_correlate_within_layers():
    rng, costs = np.random.default_rng(1), []
    for i in range(200):
        layer = i // 50
        # Taylor depends on the layer alone; similarity is the same in all layers, and lower where a head costs more.
        rise = 10 * layer + rng.random()
        costs.append(
            HeadCost(layer, i % 50, *[10 * layer - rise] * len(COST_SIMILARITIES), 10 * layer + rng.random(), rise)
        )
    figures = correlate_costs(costs)
    assert figures["taylor_rank_correlation"] > 0.9
    assert figures["taylor_rank_correlation_in_layer_low"] < 0 < figures["taylor_rank_correlation_in_layer_high"]
    assert figures["similarity_rank_correlation_in_layer_high"] < -0.2


def test_intervals_hold_the_correlation_and_shrink_with_the_number_of_heads():
    widths = []
    for n in (20, 320):
        figures = correlate_costs(make_costs(n, noise=0.5))
        low, value, high = (figures[f"taylor_rank_correlation{end}"] for end in ("_low", "", "_high"))
        assert low < value < high
        widths.append(high - low)
    # Their width falls with the square root of the number.
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.6)


def test_what_does_not_vary_correlates_with_nothing():
    costs = [cost._replace(similarity=0.5) for cost in make_costs(10, noise=0.1)]
    figures = correlate_costs(costs)
    assert [figures[f"similarity_rank_correlation{end}"] for end in ("_low", "", "_high")] == [0, 0, 0]
    assert correlate_costs(costs) == figures
