"""Spikes, divergence and stalls of losses made by hand."""

import math

import pytest

from gpt2.train.stability import WINDOW, DivergenceWatch, count_spikes, has_stalled

FLAT = [3.0] * WINDOW
# Deviation 0.1: five deviations are 0.5 nats.
NOISY = [2.9, 3.1] * (WINDOW // 2)


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([], 0),
        (FLAT * 4, 0),
        ([*FLAT, 3.2, *FLAT], 0),
        ([*FLAT, 3.3, *FLAT], 1),
        ([*NOISY, 3.45, *NOISY], 0),
        ([*NOISY, 3.55, *NOISY], 1),
        ([*FLAT, 4.0, 5.0, 4.5, 4.0, *FLAT], 1),
        ([*FLAT, *[9.0] * (2 * WINDOW), *FLAT], 1),
        ([*FLAT, *[9.0] * (2 * WINDOW), 3.0, 4.0], 2),
        ([*FLAT, 4.0, 3.0, 4.0, 3.0, 3.0, 4.0], 3),
        ([*FLAT, 1.0, *FLAT], 0),
        ([10 - 0.1 * i for i in range(90)], 0),
        ([*FLAT[1:], 9.0, *FLAT], 0),
    ],
    ids=[
        "empty",
        "flat",
        "less than a quarter nat",
        "more than a quarter nat",
        "within the noise",
        "above the noise",
        "several steps are one spike",
        "a plateau is one spike",
        "a plateau does not raise the level",
        "spikes with calm between them",
        "a fall",
        "a steady descent",
        "before there is a full window",
    ],
)
def test_spikes(losses, spikes):
    assert count_spikes(losses) == spikes


def steps_until_divergence(losses: list[float], grad_norms: list[float] | None = None) -> int | None:
    """Number of the step, from 0, at which the watch first asks to stop."""
    watch = DivergenceWatch()
    for step, (loss, norm) in enumerate(zip(losses, grad_norms or [1.0] * len(losses), strict=True)):
        if watch.update(loss, norm):
            return step
    return None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_divergence_at_once(bad):
    assert steps_until_divergence([3.0, 3.0, bad]) == 2
    assert steps_until_divergence([3.0] * 3, [1.0, 1.0, bad]) == 2
    assert steps_until_divergence([bad]) == 0


DESCENT = [8 - 0.1 * i for i in range(50)] + FLAT


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        (DESCENT + FLAT * 3, None),
        (DESCENT + [4.1] * (WINDOW - 1), None),
        (DESCENT + [4.1] * WINDOW, len(DESCENT) + WINDOW - 1),
        (DESCENT + [3.9] * 3 * WINDOW, None),
        (DESCENT + [4.1] * (WINDOW - 1) + [3.9] + [4.1] * (WINDOW - 1), None),
        (DESCENT + [4.1] * (WINDOW - 1) + [3.9] + [4.1] * WINDOW, len(DESCENT) + 2 * WINDOW - 1),
        (DESCENT + [3.6] * 2 * WINDOW + [4.2] * WINDOW, len(DESCENT) + 3 * WINDOW - 1),
        ([5.0] + [6.1] * WINDOW, WINDOW),
        ([5.0] + [5.9] * 3 * WINDOW, None),
        ([6.1] * 3 * WINDOW, None),
    ],
    ids=[
        "converged",
        "a window less one step",
        "a whole window",
        "less than a nat above",
        "one good step starts the window again",
        "a whole window after a good step",
        "the lowest mean counts, however old",
        "above the first loss",
        "near the first loss",
        "never lower",
    ],
)
def test_divergence_is_a_whole_window_far_above_the_best(losses, step):
    assert steps_until_divergence(losses) == step


@pytest.mark.parametrize(("val_loss", "stalled"), [(6.0, False), (6.85, False), (6.95, True), (7.0, True), (8.0, True)])
def test_a_run_stalls_that_learned_little_beyond_token_frequencies(val_loss, stalled):
    assert has_stalled(val_loss, unigram_entropy=7.0) is stalled
