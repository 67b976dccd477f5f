"""Rules that turn figures of several models, or runs, into a verdict.

A claim about models is judged on all of them: the main model and its replicates. It has passed, or failed, only where
the models agree; otherwise it is undecided.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["passed", "failed", "undecided", "untested", "by construction"]
VERDICTS: tuple[Verdict, ...] = ("passed", "failed", "undecided", "untested", "by construction")
# The level of all intervals and tests.
SIGNIFICANCE = 0.05
# One number for each model.
Values = Sequence[float] | np.ndarray


def of_fact(holds: bool) -> Verdict:
    """Verdict on something that is counted, not estimated."""
    return "passed" if holds else "failed"


def mean_interval(values: Values, significance: float = SIGNIFICANCE) -> tuple[float, float]:
    """Two-sided t interval of the mean over models. Of equal values, or of a single one, it is that value."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean
    low, high = stats.t.interval(1 - significance, len(values) - 1, mean, stats.sem(values))
    return float(low), float(high)


def of_margins(margins: Values, significance: float = SIGNIFICANCE) -> Verdict:
    """Verdict on a figure that must be above 0, by the interval of its mean over models.

    NaN, of a model that diverged, is undecided.
    """
    if not np.isfinite(margins).all():
        return "undecided"
    return of_interval(*mean_interval(margins, significance))


def of_interval(low: float, high: float) -> Verdict:
    """Verdict on a figure that must be above 0, by its interval: undecided if the interval contains 0."""
    if low > 0:
        return "passed"
    return "failed" if high <= 0 else "undecided"


def of_each(held: Sequence[bool] | np.ndarray) -> Verdict:
    """Verdict on something that a model either has or has not: passed if all have it, failed if none."""
    if all(held):
        return "passed"
    return "undecided" if any(held) else "failed"


def of_best(margins: Mapping[str, Values]) -> tuple[Verdict, str]:
    """Verdict on whether one of several alternatives has a figure above 0, and the one with the highest interval.

    Each interval is widened by Bonferroni's correction. Failed only if every alternative fails without the
    correction.
    """
    significance = SIGNIFICANCE / len(margins)
    best = max(margins, key=lambda name: mean_interval(margins[name], significance)[0])
    if of_margins(margins[best], significance) == "passed":
        return "passed", best
    failed = all(of_margins(values) == "failed" for values in margins.values())
    return "failed" if failed else "undecided", best


def of_trouble(troubled: int, runs: int, most: float = 0.1) -> Verdict:
    """Verdict on whether runs are free of trouble.

    Passed if none has any, failed if the share of troubled runs is above `most` by the exact 95 % interval (Clopper &
    Pearson 1934), undecided between.
    """
    if troubled == 0:
        return "passed"
    interval = stats.binomtest(troubled, runs).proportion_ci(1 - SIGNIFICANCE)
    return "failed" if interval.low > most else "undecided"


def of_comparison(p_value: float, share: float, other: float) -> Verdict:
    """Verdict on whether something happens more often to one group of runs than to the other, by a one-sided test.

    `share` and `other` are the shares of the two groups. Failed if it never happens to the first group, or is
    significantly less frequent there.
    """
    if share == 0:
        return "failed"
    if p_value <= SIGNIFICANCE:
        return "passed"
    return "failed" if share < other and p_value >= 1 - SIGNIFICANCE else "undecided"
