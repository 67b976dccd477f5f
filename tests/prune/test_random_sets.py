"""Choices of heads compared with random sets, free and layer-matched."""

from collections import Counter

import numpy as np
import pytest

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune.bootstrap import draw_weights, interval, resample_rises
from gpt2.prune.criteria import order_at_random
from gpt2.prune.frontier import SIMILAR, Evaluator, Frontier
from gpt2.prune.random_sets import compare_with_chance, draw_matched_sets, draw_sets, tabulate_similarities
from gpt2.prune.remove import remove_heads
from tests.analysed import make_evaluator, make_model, make_windows

WINDOWS = 20
HEADS = list_heads(make_model().config)


class InventedEvaluator(Evaluator):
    """Each head has a price; a set costs the sum of its heads, in nats."""

    def __init__(self, prices: dict[Head, float]):
        self.prices, self.evaluated = prices, set()

    def losses(self, removed, repair="none"):
        self.evaluated.add(frozenset(removed))
        return np.full(WINDOWS, 4 + sum(self.prices[head] for head in removed))


def count_layers(heads) -> Counter:
    return Counter(head.layer for head in heads)


@pytest.mark.parametrize(
    ("chosen", "others"),
    [
        ([Head(0, 1), Head(0, 3)], 5),
        ([Head(0, 1), Head(1, 3), Head(2, 0)], 63),
        ([Head(1, 0), Head(1, 1), Head(1, 2), Head(1, 3)], 0),
        ([Head(0, 0), Head(0, 1), Head(2, 2), Head(2, 3), Head(2, 0)], 23),
    ],
)
@pytest.mark.parametrize("n_sets", [3, 19])
def test_matched_sets_are_distinct_and_take_as_many_heads_of_each_layer(chosen, others, n_sets):
    sets = draw_matched_sets(HEADS, chosen, n_sets)
    assert len({frozenset(heads) for heads in sets}) == len(sets) == min(n_sets, others)
    assert set(chosen) not in map(set, sets)
    assert all(count_layers(heads) == count_layers(chosen) and len(set(heads)) == len(chosen) for heads in sets)
    assert sets == draw_matched_sets(HEADS, chosen, n_sets)


def test_matched_sets_take_each_head_of_a_layer_equally_often():
    sets = draw_matched_sets([Head(0, i) for i in range(20)], [Head(0, i) for i in range(5)], 800)
    counts = Counter(head for heads in sets for head in heads)
    # A standard deviation is 12.
    assert len(counts) == 20 and all(abs(n - 200) < 50 for n in counts.values())


def test_the_free_sets_are_those_of_the_seeds_from_1():
    assert draw_sets(HEADS, 3, 4) == [order_at_random(HEADS, seed)[:3] for seed in (1, 2, 3, 4)]


def test_a_choice_is_judged_within_its_layers():
    """Heads of the first layer are dear. A choice of its cheaper ones costs more than free sets, less than matched."""
    prices = {head: (0.05 if head.layer == 0 else 0.001) + 0.01 * head.index for head in HEADS}
    evaluator = InventedEvaluator(prices)
    choices = {"": [Head(0, 0), Head(0, 1)], "taylor_": [Head(2, 3), Head(1, 0)]}
    figures = compare_with_chance(evaluator, HEADS, choices, 19)
    rises = {
        size: 100 * np.expm1([sum(prices[head] for head in heads) for heads in sets])
        for size, sets in (
            ("free", draw_sets(HEADS, 2, 19)),
            ("matched", draw_matched_sets(HEADS, choices[""], 19)),
            ("taylor", draw_matched_sets(HEADS, choices["taylor_"], 19)),
        )
    }
    assert figures["random_sets"] == 19
    for end, value in (("", rises["free"].mean()), ("low_", rises["free"].min()), ("high_", rises["free"].max())):
        assert figures[f"random_sets_{end}perplexity_rise_percent_at_15"] == pytest.approx(value, abs=1e-6)
    own = 100 * np.expm1(0.11)
    assert figures["cheaper_random_sets_at_15"] == (rises["free"] < own - 1e-9).sum() > 10
    # All six pairs of the layer, without the choice.
    assert (figures["matched_random_sets_at_15"], figures["cheaper_matched_random_sets_at_15"]) == (5, 0)
    mean = figures["matched_random_sets_perplexity_rise_percent_at_15"]
    assert mean == pytest.approx(rises["matched"].mean(), abs=1e-6)
    own = 100 * np.expm1(0.032)
    assert figures["taylor_cheaper_matched_random_sets_at_15"] == (rises["taylor"] < own - 1e-9).sum()


def test_a_choice_without_alternatives_is_compared_with_itself():
    chosen = [Head(1, index) for index in range(4)]
    figures = compare_with_chance(InventedEvaluator(dict.fromkeys(HEADS, 0.01)), HEADS, {"": chosen}, 5)
    assert (figures["matched_random_sets_at_15"], figures["cheaper_matched_random_sets_at_15"]) == (0, 0)
    rise = figures["matched_random_sets_perplexity_rise_percent_at_15"]
    assert rise == pytest.approx(100 * np.expm1(0.04), abs=1e-6)


def test_rises_are_those_of_the_pruned_models():
    model, windows = make_model(), make_windows(5)
    chosen = [Head(0, 0), Head(0, 2), Head(2, 1)]
    figures = compare_with_chance(make_evaluator(model, windows), HEADS, {"": chosen}, 4)
    losses = [mean_loss(remove_heads(model, heads), windows, 5) for heads in draw_matched_sets(HEADS, chosen, 4)]
    rises = 100 * np.expm1(np.array(losses) - mean_loss(model, windows, 5))
    assert figures["matched_random_sets_at_15"] == 4
    assert figures["matched_random_sets_perplexity_rise_percent_at_15"] == pytest.approx(rises.mean(), abs=1e-5)


def make_frontier(rises: dict[str, float]) -> Frontier:
    """Frontiers of 0, 2 and 4 heads from rises in percent of a perplexity, with noise among windows."""
    rng = np.random.default_rng(0)
    whole = rng.normal(4, 1, WINDOWS)

    def losses(rise: float) -> np.ndarray:
        noise = rng.normal(0, 0.002, (1, WINDOWS))
        return whole + np.log1p(rise / 100) + noise - noise.mean()

    return Frontier([0, 2, 4], {name: [whole[None], *(losses(rise) for _ in (2, 4))] for name, rise in rises.items()})


def test_the_table_has_the_paired_difference_to_the_random_sets_at_15_percent():
    names = ["redundancy", *(column.name for column in SIMILAR)]
    frontier = make_frontier({name: 0.5 + place for place, name in enumerate(names)})
    whole, *_ = frontier.losses["redundancy"][0]
    # The losses of a set rise equally in all windows, so that only the choice varies with the windows.
    sets = np.stack([whole + np.log1p(rise / 100) for rise in (1.0, 2.0, 6.0)])
    weights = draw_weights(np.arange(WINDOWS))
    header, rows = tabulate_similarities(frontier, 4, sets, weights)
    table = [dict(zip(header, row, strict=True)) for row in rows]
    orders = [name.removeprefix("similarity_") for name in names]
    assert [row[:2] for row in rows] == [[order, count] for order in orders for count in (2, 4)]
    assert {row["above_random_percent"] for row in table if row["heads_removed"] == 2} == {None}
    for name, row in zip(names, table[1::2], strict=True):
        assert row["above_random_percent"] == pytest.approx(row["rise_percent"] - 3, abs=1e-5)
        draws = frontier.resample(name, 4, weights) - resample_rises(weights, whole, sets)
        assert (row["above_random_low"], row["above_random_high"]) == pytest.approx(interval(draws), abs=1e-6)
        # The sets differ by 5 points, which does not count.
        assert row["above_random_high"] - row["above_random_low"] < 0.5
