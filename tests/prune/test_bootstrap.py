"""Paired bootstrap intervals of rises of perplexity."""

import math

import numpy as np
import pytest

from gpt2.prune.bootstrap import interval, resample_rises


def make_losses(n_windows: int, rise: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows whose losses differ much from each other, and each of which rises by about as much, up to noise."""
    rng = np.random.default_rng(seed)
    whole = rng.normal(4, 1, n_windows)
    return whole, (whole + rise + noise * rng.normal(size=n_windows))[None]


def test_draws_pair_the_windows():
    whole, pruned = make_losses(40, rise=math.log(1.03), noise=0)
    # However the windows are drawn, each of them costs 3 % more.
    assert resample_rises(whole, pruned) == pytest.approx(3.0, abs=1e-9)


def test_the_interval_is_that_of_a_mean_of_differences():
    whole, pruned = make_losses(400, rise=0.02, noise=0.1)
    low, high = interval(resample_rises(whole, pruned))
    differences = pruned[0] - whole
    half = 1.96 * differences.std() / math.sqrt(400)
    assert low == pytest.approx(100 * math.expm1(differences.mean() - half), abs=0.15)
    assert high == pytest.approx(100 * math.expm1(differences.mean() + half), abs=0.15)


def test_nine_or_ten_of_ten_intervals_hold_the_truth():
    truth, held = 100 * math.expm1(0.02), 0
    for seed in range(100):
        low, high = interval(resample_rises(*make_losses(60, rise=0.02, noise=0.1, seed=seed)))
        held += low <= truth <= high
    assert 88 <= held <= 100


def test_several_orders_are_drawn_as_well():
    whole, _ = make_losses(50, rise=0, noise=0)
    orders = np.stack([whole + math.log1p(rise / 100) for rise in (1.0, 3.0, 8.0)])
    draws = resample_rises(whole, orders)
    # The windows agree, so that all that varies is which orders are drawn.
    assert draws.min() == pytest.approx(1) and draws.max() == pytest.approx(8)
    assert draws.mean() == pytest.approx(4, abs=0.1)
    assert interval(draws)[0] < 2 and interval(draws)[1] > 6


def test_the_same_windows_are_drawn_for_all_models():
    whole, pruned = make_losses(30, rise=0.02, noise=0.2)
    assert np.array_equal(resample_rises(whole, pruned), resample_rises(whole, pruned))
    difference = resample_rises(whole, pruned + math.log(1.01)) - resample_rises(whole, pruned)
    # 1 % of what each draw costs, which varies by a tenth; drawn apart, the two would differ by 5 and more.
    assert difference == pytest.approx(1.02, abs=0.2)
