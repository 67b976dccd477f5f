"""Spikes, divergence and stalls of losses made by hand."""

import math

import numpy as np
import pytest

from gpt2.train.stability import (
    DIVERGENCE_NATS,
    SPIKE_NATS,
    STALL_NATS,
    WINDOW,
    DivergenceWatch,
    count_spikes,
    has_stalled,
)

FLAT = [3.0] * WINDOW
# Standard deviation 0.1: five deviations are 0.5 nats.
NOISY = [2.9, 3.1] * (WINDOW // 2)
PLATEAU = [9.0] * (2 * WINDOW)
SPIKES = {
    "empty": ([], 0),
    "flat": (FLAT * 4, 0),
    "less than SPIKE_NATS": ([*FLAT, 3 + SPIKE_NATS - 0.01, *FLAT], 0),
    "more than SPIKE_NATS": ([*FLAT, 3 + SPIKE_NATS + 0.01, *FLAT], 1),
    "within five deviations": ([*NOISY, 3.49, *NOISY], 0),
    "beyond five deviations": ([*NOISY, 3.51, *NOISY], 1),
    "several steps are one spike": ([*FLAT, 4.0, 5.0, 4.5, 4.0, *FLAT], 1),
    "a plateau is one spike": ([*FLAT, *PLATEAU, *FLAT], 1),
    "a plateau does not raise the level": ([*FLAT, *PLATEAU, 3.0, 4.0], 2),
    "spikes separated by one calm step": ([*FLAT, 4.0, 3.0, 4.0, 3.0, 3.0, 4.0], 3),
    "a fall": ([*FLAT, 1.0, *FLAT], 0),
    "a steady descent": ([*np.linspace(10, 2, 200)], 0),
    "a slow rise": ([*np.linspace(2, 10, 200)], 0),
    "before the first full window": ([*FLAT[1:], 9.0, *FLAT], 0),
}


@pytest.mark.parametrize(("losses", "spikes"), SPIKES.values(), ids=SPIKES)
def test_count_spikes(losses, spikes):
    assert count_spikes(losses) == spikes


def divergence_step(losses: list[float], grad_norms: list[float] | None = None) -> int | None:
    """The step, counted from 0, at which the watch first asks to stop."""
    watch = DivergenceWatch()
    pairs = zip(losses, grad_norms or [1.0] * len(losses), strict=True)
    return next((step for step, pair in enumerate(pairs) if watch.update(*pair)), None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_divergence_at_once(bad):
    assert divergence_step([3.0, 3.0, bad]) == 2
    assert divergence_step([3.0] * 3, [1.0, 1.0, bad]) == 2
    assert divergence_step([bad]) == 0


# Best window mean 3.0, and losses a little more and a little less than DIVERGENCE_NATS above it.
DESCENT = [8 - 0.1 * i for i in range(50)] + FLAT
HIGH, ALMOST = 3 + DIVERGENCE_NATS + 0.1, 3 + DIVERGENCE_NATS - 0.1
DIVERGENCES = {
    "converged": (DESCENT + FLAT * 3, None),
    "a window less one step": (DESCENT + [HIGH] * (WINDOW - 1), None),
    "a whole window": (DESCENT + [HIGH] * WINDOW, len(DESCENT) + WINDOW - 1),
    "not high enough": (DESCENT + [ALMOST] * 3 * WINDOW, None),
    "one good step starts the window again": (
        DESCENT + [HIGH] * (WINDOW - 1) + [ALMOST] + [HIGH] * (WINDOW - 1),
        None,
    ),
    "a whole window after a good step": (
        DESCENT + [HIGH] * (WINDOW - 1) + [ALMOST] + [HIGH] * WINDOW,
        len(DESCENT) + 2 * WINDOW - 1,
    ),
    "the lowest mean counts, however old": (
        DESCENT + [3.6] * 2 * WINDOW + [4.2] * WINDOW,
        len(DESCENT) + 3 * WINDOW - 1,
    ),
    "above the first loss": ([5.0] + [6.1] * WINDOW, WINDOW),
    "near the first loss": ([5.0] + [5.9] * 3 * WINDOW, None),
    "never lower": ([6.1] * 3 * WINDOW, None),
}


@pytest.mark.parametrize(("losses", "step"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_divergence_is_a_whole_window_far_above_the_best(losses, step):
    assert divergence_step(losses) == step


@pytest.mark.parametrize("resumed_at", [0, 1, 31, 33, 70, 100])
def test_a_watch_that_is_fed_the_losses_again_goes_on_as_the_first_did(resumed_at):
    losses, watch = [3.0] * 70 + [HIGH] * WINDOW, DivergenceWatch()
    assert not any(watch.update(loss, 1.0) for loss in losses[:resumed_at])
    assert [watch.update(loss, 1.0) for loss in losses[resumed_at:]].index(True) == len(losses) - 1 - resumed_at


@pytest.mark.parametrize(("above", "stalled"), [(-1.0, False), (-0.15, False), (-0.05, True), (0, True), (1, True)])
def test_a_stalled_run_learned_little_beyond_token_frequencies(above, stalled):
    assert has_stalled(7.0 + above, unigram_entropy=7.0) is stalled
    assert 0.05 < STALL_NATS < 0.15
