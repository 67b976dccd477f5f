"""Two models on the same items: by how much is one right more often, and may that be chance?"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Of a normal distribution, both sides together 5 %.
Z_95 = 1.96


class Comparison(NamedTuple):
    """Two models on the same items by one accuracy."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def items(self) -> int:
        return sum(self)

    @property
    def difference(self) -> tuple[float, float]:
        """Accuracy of B less that of A, and half its 95 % interval (Agresti 2002, section 10.1.1)."""
        n, p_a, p_b = self.items, self.only_a / self.items, self.only_b / self.items
        return p_b - p_a, Z_95 * math.sqrt((p_a + p_b - (p_b - p_a) ** 2) / n)

    @property
    def p_value(self) -> float:
        """Two-sided exact p of McNemar's test: a fair coin for each item that only one of them has right."""
        n = self.only_a + self.only_b
        tail = sum(math.comb(n, k) for k in range(min(self.only_a, self.only_b) + 1))
        return min(1.0, float(Fraction(2 * tail, 2**n)))


def count_items(right_a: np.ndarray, right_b: np.ndarray) -> Comparison:
    """From which items (N,) each of the models has right."""
    cells = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b)
    return Comparison(*(int(cell.sum()) for cell in cells))
