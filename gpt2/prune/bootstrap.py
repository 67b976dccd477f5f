"""Percentile intervals of a rise of perplexity: a cluster bootstrap over documents.

Windows of one document are not independent, so groups of windows that share a document are drawn with replacement
(Davison & Hinkley 1997, section 3.8). All models are evaluated on the same draws, which pairs them. Orders of heads
and random sets are not drawn: the interval holds for the sets that were measured.

Letters: N windows, S sets of heads, R draws.
"""

import numpy as np

RESAMPLES, SEED = 2000, 0
ENDS = (2.5, 97.5)


def draw_weights(groups: np.ndarray) -> np.ndarray:
    """Weight of each window in the mean of each draw, (R, N), for the group number (N,) of each window.

    A draw takes as many groups as there are. If all windows are in one group, windows are drawn.
    """
    n_groups = int(groups.max()) + 1
    if n_groups == 1:
        groups, n_groups = np.arange(len(groups)), len(groups)
    drawn = np.random.default_rng(SEED).integers(0, n_groups, (RESAMPLES, n_groups))
    counts = np.stack([np.bincount(row, minlength=n_groups) for row in drawn])[:, groups]
    return counts / counts.sum(1, keepdims=True)


def resample_rises(weights: np.ndarray, whole: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Rise of perplexity in percent, mean over S sets, in each draw (R,).

    whole (N,) and pruned (S, N): mean loss of each window of the whole model and without each set of heads.
    """
    return 100 * np.expm1(weights @ (pruned - whole).T).mean(1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % percentile interval of the draws (R,)."""
    low, high = np.percentile(draws, ENDS)
    return float(low), float(high)
