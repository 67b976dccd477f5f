"""Comparison of two models on the same items: McNemar's exact test, and the difference of their accuracies."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


class Comparison(NamedTuple):
    """Items that both models, only A, only B or neither has right, by one accuracy."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def items(self) -> int:
        return sum(self)

    @property
    def difference(self) -> tuple[float, float]:
        """Accuracy of B less that of A, and half the width of its 95 % interval."""
        low, high = self.interval
        return (self.only_b - self.only_a) / self.items, (high - low) / 2

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy of B less that of A.

        Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: Wilson's intervals of both accuracies, put
        together with their correlation phi, whose numerator is corrected for continuity. Unlike Wald's,
        the interval is within [-1, 1] and wider than a point if the models agree on all items.
        """
        n, right_a, right_b = self.items, self.both + self.only_a, self.both + self.only_b
        p_a, p_b = right_a / n, right_b / n
        low_a, high_a = binomtest(right_a, n).proportion_ci(method="wilson")
        low_b, high_b = binomtest(right_b, n).proportion_ci(method="wilson")
        determinant = self.both * self.neither - self.only_a * self.only_b
        corrected = max(determinant - n / 2, 0) if determinant > 0 else determinant
        margins = right_a * (n - right_a) * right_b * (n - right_b)
        phi = corrected / math.sqrt(margins) if margins else 0.0

        def combine(of_a: float, of_b: float) -> float:
            return math.sqrt(of_a**2 - 2 * phi * of_a * of_b + of_b**2)

        return p_b - p_a - combine(high_a - p_a, p_b - low_b), p_b - p_a + combine(p_a - low_a, high_b - p_b)

    @property
    def p_value(self) -> float:
        """Two-sided exact p of McNemar's test: a fair coin for each item that only one of them has right."""
        differing = self.only_a + self.only_b
        return binomtest(self.only_a, differing).pvalue if differing else 1.0


def count_items(right_a: np.ndarray, right_b: np.ndarray) -> Comparison:
    """The comparison of two models by which items (N,) bool each has right."""
    cells = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b)
    return Comparison(*(int(cell.sum()) for cell in cells))
