"""What each head costs alone, and rank correlations with intervals."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from gpt2.heads.similarity import list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune.criteria import score_taylor
from gpt2.prune.frontier import Evaluator
from gpt2.prune.remove import remove_heads
from gpt2.prune.repair import gather_calibration
from gpt2.prune.single_heads import COST_PREDICTORS, COST_SIMILARITIES, HeadCost, correlate_costs, cost_each_head
from gpt2.report import measures
from tests.analysed import make_model, make_windows


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
    evaluator = Evaluator(model, gather_calibration(model, windows, 4, 1e-3, np.eye(12)), windows, 4)
    return cost_each_head(evaluator, list_heads(model.config), similarities, taylor), taylor


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
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
    ends = [f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high")]
    assert list(figures) == ends and COST_PREDICTORS == tuple(measures.PREDICTOR_NAMES)


def test_what_tells_no_more_than_the_layer_correlates_with_nothing_in_it():
    rng, costs = np.random.default_rng(1), []
    for i in range(200):
        layer = i // 50
        # The importance tells the layer alone; similarity is the same in all layers, and lower where a head costs more.
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
