"""Intervals of a rise of perplexity over the windows that it was measured on.

The windows lie evenly over the split and stand for other text. Each of RESAMPLES draws takes as many windows with
replacement, the same ones for all models (paired percentile bootstrap, Efron & Tibshirani 1993, chapter 13). Where
several orders of heads were measured, random ones, they are drawn as well.

Letters: N windows, S orders of heads, R draws.
"""

from functools import cache

import numpy as np

RESAMPLES, SEED = 2000, 0
ENDS = (2.5, 97.5)


def resample_rises(whole: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Rise of perplexity in percent, mean over S orders, in each draw (R,).

    From the mean loss of each window: of the whole model (N,) and of those without heads (S, N).
    """
    rises = 100 * np.expm1(_weights(len(whole)) @ (pruned - whole).T)
    if len(pruned) > 1:
        drawn = np.random.default_rng(SEED + 1).integers(0, len(pruned), rises.shape)
        rises = np.take_along_axis(rises, drawn, axis=1)
    return rises.mean(1)


@cache
def _weights(n_windows: int) -> np.ndarray:
    """The share of each window in each draw, (R, N)."""
    drawn = np.random.default_rng(SEED).integers(0, n_windows, (RESAMPLES, n_windows))
    return np.stack([np.bincount(row, minlength=n_windows) for row in drawn]) / n_windows


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The two ends between which 95 % of the draws (R,) lie."""
    low, high = np.percentile(draws, ENDS)
    return float(low), float(high)
