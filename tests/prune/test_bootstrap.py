"""Cluster bootstrap intervals of rises of perplexity."""

import math

import numpy as np
import pytest

from gpt2.prune.bootstrap import RESAMPLES, SEED, draw_weights, interval, resample_rises


def make_losses(n_windows: int, rise: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows whose losses differ much from each other, and each of which rises by about as much, up to noise."""
    rng = np.random.default_rng(seed)
    whole = rng.normal(4, 1, n_windows)
    return whole, (whole + rise + noise * rng.normal(size=n_windows))[None]


def draw(whole: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Draws of the rise with each window in its own group."""
    return resample_rises(draw_weights(np.arange(len(whole))), whole, pruned)


def test_draws_pair_the_windows():
    # However the windows are drawn, each of them costs 3 % more.
    assert draw(*make_losses(40, rise=math.log(1.03), noise=0)) == pytest.approx(3.0, abs=1e-9)


def test_the_interval_is_that_of_a_mean_of_differences():
    whole, pruned = make_losses(400, rise=0.02, noise=0.1)
    low, high = interval(draw(whole, pruned))
    differences = pruned[0] - whole
    half = 1.96 * differences.std() / math.sqrt(400)
    assert low == pytest.approx(100 * math.expm1(differences.mean() - half), abs=0.15)
    assert high == pytest.approx(100 * math.expm1(differences.mean() + half), abs=0.15)


def test_the_interval_has_its_nominal_coverage():
    truth, held = 100 * math.expm1(0.02), 0
    for seed in range(100):
        low, high = interval(draw(*make_losses(60, rise=0.02, noise=0.1, seed=seed)))
        held += low <= truth <= high
    assert 88 <= held <= 100


def test_orders_are_averaged_and_not_drawn():
    whole, _ = make_losses(50, rise=0, noise=0)
    orders = np.stack([whole + math.log1p(rise / 100) for rise in (1.0, 3.0, 8.0)])
    assert draw(whole, orders) == pytest.approx(4, abs=1e-9)


def test_groups_of_one_window_are_the_plain_bootstrap():
    drawn = np.random.default_rng(SEED).integers(0, 30, (RESAMPLES, 30))
    expected = np.stack([np.bincount(row, minlength=30) for row in drawn]) / 30
    assert np.array_equal(draw_weights(np.arange(30)), expected)


def test_the_windows_of_a_group_are_drawn_together():
    weights = draw_weights(np.array([0, 0, 0, 1, 2, 2]))
    assert weights.sum(1) == pytest.approx(1)
    assert np.array_equal(weights[:, 0], weights[:, 1]) and np.array_equal(weights[:, 4], weights[:, 5])
    # All three draws are of the first group in 1 of 27.
    assert (weights[:, :3] == 1 / 3).all(1).mean() == pytest.approx(1 / 27, abs=0.015)


def test_windows_that_agree_within_groups_widen_the_interval_by_the_root_of_the_group_size():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(50), 4)
    whole = rng.normal(4, 1, 200)
    pruned = (whole + rng.normal(0.02, 0.1, 50)[groups])[None]
    widths = [
        np.ptp(interval(resample_rises(draw_weights(drawn), whole, pruned))) for drawn in (groups, np.arange(200))
    ]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)


def test_windows_of_a_single_group_are_drawn_themselves():
    assert np.array_equal(draw_weights(np.zeros(20, dtype=int)), draw_weights(np.arange(20)))
