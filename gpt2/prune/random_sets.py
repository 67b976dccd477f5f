"""Does a criterion choose better than chance? Random sets of as many heads, and how many of them cost less."""

from collections.abc import Iterable, Sequence

import numpy as np

from gpt2.heads.similarity import Head
from gpt2.prune.bootstrap import interval
from gpt2.prune.criteria import order_at_random
from gpt2.prune.frontier import DIGITS, Evaluator, Frontier, prefix_of, rise_with_interval

# Before the names of the orders of similarity_orders.py in metrics/prune.json.
SIMILARITY_PREFIX = "similarity_"


def measure_random_sets(evaluator: Evaluator, heads: Sequence[Head], count: int, n_sets: int) -> np.ndarray:
    """Mean loss (S,) without each of `n_sets` random sets of `count` heads, those of the seeds from 1."""
    orders = [order_at_random(heads, seed) for seed in range(1, n_sets + 1)]
    return np.array([evaluator.losses(order[:count]).mean() for order in orders])


def compare_with_chance(
    frontier: Frontier, similar: Frontier, names: Iterable[str], count: int, sets: np.ndarray
) -> dict[str, float]:
    """Figures of metrics/prune.json for `count` heads, which are 15 % of all.

    random_sets_: how many were measured, and the lowest, mean and highest rise of perplexity without one.
    <column>_cheaper_random_sets_at_15: how many cost less than the choice of a column of `frontier`, for `names`, those
    without repair. similarity_<order>_: the same for every order of `similar`, with the rise and its interval.
    """
    whole = next(iter(frontier.losses.values()))[0].mean()
    rises = 100 * np.expm1(sets - whole)
    figures = {
        "random_sets": len(sets),
        "random_sets_perplexity_rise_percent_at_15": rises.mean(),
        "random_sets_low_perplexity_rise_percent_at_15": rises.min(),
        "random_sets_high_perplexity_rise_percent_at_15": rises.max(),
    }
    chosen = {prefix_of(name): (frontier, name) for name in names}
    chosen |= {f"{SIMILARITY_PREFIX}{name}_": (similar, name) for name in similar.losses}
    for prefix, (measured, name) in chosen.items():
        rise = measured.rise_percent(name, count)
        figures[f"{prefix}cheaper_random_sets_at_15"] = int((rises < rise).sum())
    for name in similar.losses:
        for end, value in zip(("", "_low", "_high"), rise_with_interval(similar, name, count), strict=True):
            figures[f"{SIMILARITY_PREFIX}{name}_perplexity_rise_percent_at_15{end}"] = value
    return {key: round(float(value), DIGITS) if isinstance(value, float) else value for key, value in figures.items()}


def tabulate_similarities(frontier: Frontier, similar: Frontier) -> tuple[list[str], list[list]]:
    """Columns and rows of similarities.csv: each order's rise of perplexity by count, and how far it is above random's.

    95 % intervals over windows; those of the difference are also over the random orders. Redundancy, which goes by the
    patterns, comes first.
    """
    rows = []
    for measured, name in ((frontier, "redundancy"), *((similar, name) for name in similar.losses)):
        for count in frontier.counts[1:]:
            above = measured.rise_percent(name, count) - frontier.rise_percent("random", count)
            draws = measured.resample(name, count) - frontier.resample("random", count)
            numbers = (*rise_with_interval(measured, name, count), above, *interval(draws))
            rows.append([name, count, *(round(number, DIGITS) for number in numbers)])
    columns = ["order", "heads_removed", "rise_percent", "low", "high"]
    return [*columns, "above_random_percent", "above_random_low", "above_random_high"], rows
