"""Permutation tests of a choice of heads: random sets of as many heads, free or with the same number of each layer.

A criterion that takes all its heads of one layer is compared with that layer by free sets, and with chance only by sets
that take as many heads of each layer (restricted permutations, Good 2005).

Letters: N windows, S sets of heads.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gpt2.heads.similarity import Head
from gpt2.prune.bootstrap import interval, resample_rises
from gpt2.prune.criteria import SIMILARITY_PREFIX, Order, order_at_random
from gpt2.prune.frontier import DIGITS, SIMILAR, Evaluator, Frontier


def draw_sets(heads: Sequence[Head], count: int, n_sets: int) -> list[Order]:
    """`n_sets` random sets of `count` heads, from the seeds 1, 2, ..."""
    return [order_at_random(heads, seed)[:count] for seed in range(1, n_sets + 1)]


def draw_matched_sets(heads: Sequence[Head], chosen: Order, n_sets: int) -> list[Order]:
    """Distinct random sets other than `chosen` with as many heads of each layer, from the seeds 1, 2, ...

    Returns `n_sets` of them, or all that exist if these are fewer.
    """
    available, taken = (Counter(head.layer for head in some) for some in (heads, chosen))
    wanted = min(n_sets, math.prod(math.comb(available[layer], n) for layer, n in taken.items()) - 1)
    sets: dict[tuple[Head, ...], None] = {}
    for seed in itertools.count(1):
        if len(sets) == wanted:
            break
        order = order_at_random(heads, seed)
        picked = [head for layer, n in taken.items() for head in [h for h in order if h.layer == layer][:n]]
        if set(picked) != set(chosen):
            sets[tuple(sorted(picked))] = None
    return [list(heads) for heads in sets]


def compare_with_chance(
    evaluator: Evaluator, heads: Sequence[Head], choices: Mapping[str, Order], n_sets: int
) -> dict[str, float]:
    """Figures of metrics/prune.json for `choices` of equally many heads, by the prefix of their keys.

    random_sets: the number of free sets; random_sets_[low_|high_]perplexity_rise_percent_at_15: their mean, lowest and
    highest rise. <prefix>cheaper_random_sets_at_15: how many of them cost less than the choice.
    <prefix>matched_random_sets_at_15, <prefix>matched_random_sets_perplexity_rise_percent_at_15 and
    <prefix>cheaper_matched_random_sets_at_15: number, mean rise and number of cheaper ones of the layer-matched sets.
    If no such set exists, the mean is the rise of the choice.
    """
    whole = evaluator.losses([]).mean()

    def rises(sets: Sequence[Order]) -> np.ndarray:
        return 100 * np.expm1([evaluator.losses(removed).mean() - whole for removed in sets])

    free = rises(draw_sets(heads, len(next(iter(choices.values()))), n_sets))
    figures = {"random_sets": n_sets} | {
        f"random_sets_{end}perplexity_rise_percent_at_15": round(float(value), DIGITS)
        for end, value in (("", free.mean()), ("low_", free.min()), ("high_", free.max()))
    }
    for prefix, chosen in choices.items():
        [rise] = rises([chosen])
        matched = rises(draw_matched_sets(heads, chosen, n_sets))
        mean = float(matched.mean() if len(matched) else rise)
        figures |= {
            f"{prefix}cheaper_random_sets_at_15": int((free < rise).sum()),
            f"{prefix}matched_random_sets_at_15": len(matched),
            f"{prefix}matched_random_sets_perplexity_rise_percent_at_15": round(mean, DIGITS),
            f"{prefix}cheaper_matched_random_sets_at_15": int((matched < rise).sum()),
        }
    return figures


def tabulate_similarities(
    frontier: Frontier, claimed: int, sets: np.ndarray, weights: np.ndarray
) -> tuple[list[str], list[list]]:
    """Columns and rows of similarities.csv: redundancy by each similarity, its rise of perplexity by count and the 95 %
    interval.

    above_random_percent, for `claimed` heads only: the rise less the mean rise of random sets with losses `sets` (S,
    N). Its interval is that of the difference on the same windows, given these sets: documents are drawn, sets are not.
    """
    rows: list[list] = []
    whole, *_ = frontier.losses["redundancy"][0]
    random_rise = 100 * np.expm1((sets - whole).mean(1)).mean()
    for name in ("redundancy", *(column.name for column in SIMILAR)):
        for count in frontier.counts[1:]:
            rise, *ends = frontier.rise_with_interval(name, count, weights)
            above: tuple[float, ...] = ()
            if count == claimed:
                draws = frontier.resample(name, count, weights) - resample_rises(weights, whole, sets)
                above = rise - random_rise, *interval(draws)
            numbers = [round(float(number), DIGITS) for number in (rise, *ends, *above)]
            rows.append([name.removeprefix(SIMILARITY_PREFIX), count, *numbers, *[None] * (6 - len(numbers))])
    columns = ["order", "heads_removed", "rise_percent", "low", "high"]
    return [*columns, "above_random_percent", "above_random_low", "above_random_high"], rows
