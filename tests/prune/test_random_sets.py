"""Choices beside random sets of as many heads."""

import numpy as np
import pytest

from gpt2.heads.similarity import list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune.bootstrap import interval
from gpt2.prune.criteria import order_at_random
from gpt2.prune.frontier import Evaluator, Frontier
from gpt2.prune.random_sets import compare_with_chance, measure_random_sets, tabulate_similarities
from gpt2.prune.remove import remove_heads
from gpt2.prune.repair import gather_calibration
from tests.analysed import make_model, make_windows

WINDOWS = 20


def make_frontier(seed: int = 0, **rises: tuple[float, ...]) -> Frontier:
    """Frontiers of 0 and 4 heads: rises in percent of a perplexity, one for each order, up to noise among windows."""
    rng = np.random.default_rng(seed)
    whole = rng.normal(4, 1, WINDOWS)

    def losses(values: tuple[float, ...]) -> np.ndarray:
        noise = rng.normal(0, 0.002, (len(values), WINDOWS))
        return whole + np.log1p(np.array(values) / 100)[:, None] + noise - noise.mean(1, keepdims=True)

    return Frontier([0, 4], {name: [np.stack([whole] * len(values)), losses(values)] for name, values in rises.items()})


def losses_of(frontier: Frontier, rises: list[float]) -> np.ndarray:
    return next(iter(frontier.losses.values()))[0][0].mean() + np.log1p(np.array(rises) / 100)


def test_the_sets_are_those_of_the_seeds_from_1():
    model, windows = make_model(), make_windows(5)
    evaluator = Evaluator(model, gather_calibration(model, windows, 5, 1e-3, np.eye(12)), windows, 5)
    heads = list_heads(model.config)
    found = measure_random_sets(evaluator, heads, 3, 4)
    expected = [mean_loss(remove_heads(model, order_at_random(heads, seed)[:3]), windows, 5) for seed in (1, 2, 3, 4)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_sets_that_cost_less_than_a_choice_are_counted():
    frontier = make_frontier(redundancy=(5.0,), taylor=(1.0,), random=(2.0, 4.0))
    similar = make_frontier(qk=(3.5,), written=(9.0,))
    sets = losses_of(frontier, [1.5, 2.0, 3.0, 6.0])
    figures = compare_with_chance(frontier, similar, ["redundancy", "taylor"], 4, sets)
    counts = {key: value for key, value in figures.items() if "cheaper" in key}
    assert counts == {
        "cheaper_random_sets_at_15": 3,
        "taylor_cheaper_random_sets_at_15": 0,
        "similarity_qk_cheaper_random_sets_at_15": 3,
        "similarity_written_cheaper_random_sets_at_15": 4,
    }
    assert figures["random_sets"] == 4
    ends = {"": 3.125, "low_": 1.5, "high_": 6.0}
    for end, rise in ends.items():
        assert figures[f"random_sets_{end}perplexity_rise_percent_at_15"] == pytest.approx(rise, abs=1e-6)
    low, rise, high = (figures[f"similarity_qk_perplexity_rise_percent_at_15{end}"] for end in ("_low", "", "_high"))
    assert low < rise < high and rise == pytest.approx(3.5, abs=1e-6)


def test_the_table_holds_the_difference_to_random_with_its_interval():
    frontier, similar = make_frontier(redundancy=(5.0,), random=(2.0, 4.0)), make_frontier(qk=(0.5,))
    header, rows = tabulate_similarities(frontier, similar)
    assert [row[:2] for row in rows] == [["redundancy", 4], ["qk", 4]]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["above_random_percent"] for row in table] == pytest.approx([2.0, -2.5], abs=1e-3)
    for row, measured in zip(table, (frontier, similar), strict=True):
        draws = measured.resample(row["order"], 4) - frontier.resample("random", 4)
        assert (row["above_random_low"], row["above_random_high"]) == pytest.approx(interval(draws), abs=1e-6)
        # Over the two random orders too, of which one may be drawn twice.
        assert row["above_random_high"] - row["above_random_low"] > 1.9
