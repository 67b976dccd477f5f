"""Rules that say whether a run spiked, diverged or stalled, as functions of its training losses alone.

The constants are part of the result: two runs are compared by one rule.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

# A loss is judged against this many losses before it.
WINDOW = 32
# Spike: this many standard deviations, and at least this many nats, above the mean of the window.
SPIKE_DEVIATIONS, SPIKE_NATS = 5.0, 0.25
# Divergence: a whole window of losses at least this many nats above the lowest window mean so far.
DIVERGENCE_NATS = 1.0
# Stall: validation loss not at least this many nats below the unigram entropy.
STALL_NATS = 0.1


def count_spikes(losses: Sequence[float]) -> int:
    """Number of spikes: maximal runs of steps whose losses exceed those of the WINDOW steps before the run."""
    spikes, inside = 0, False
    recent: deque[float] = deque(maxlen=WINDOW)
    for loss in losses:
        above = len(recent) == WINDOW and loss > _spike_level(recent)
        spikes += above and not inside
        inside = above
        if not above:
            recent.append(loss)
    return spikes


def _spike_level(recent: Sequence[float]) -> float:
    return float(np.mean(recent)) + max(SPIKE_DEVIATIONS * float(np.std(recent)), SPIKE_NATS)


class DivergenceWatch:
    """Says after each step whether the run has diverged, from its losses and gradient norms so far.

    Diverged: a loss or gradient norm that is not finite, or each of the last WINDOW losses more than DIVERGENCE_NATS
    above the lowest mean of WINDOW losses before them (above the first loss while there is no such mean yet).
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=2 * WINDOW)
        self._best = math.inf

    def update(self, loss: float, grad_norm: float) -> bool:
        """Add the figures of the next step; return whether to stop."""
        self._recent.append(loss)
        before, last = [*self._recent][:-WINDOW], [*self._recent][-WINDOW:]
        if len(before) == WINDOW or (before and math.isinf(self._best)):
            self._best = min(self._best, float(np.mean(before)))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return True
        return len(last) == WINDOW and min(last) > self._best + DIVERGENCE_NATS


def has_stalled(val_loss: float, unigram_entropy: float) -> bool:
    """Whether a run learned no more than token frequencies: it can fail so smoothly, without a spike."""
    return val_loss > unigram_entropy - STALL_NATS
