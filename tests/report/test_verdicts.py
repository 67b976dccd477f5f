"""Verdicts on several models: passed or failed only where the models agree."""

import math

import numpy as np
import pytest

from gpt2.report import verdicts


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.2, 0.8], "passed"),
        ([-1.0, -1.1, -0.9, -1.2, -0.8], "failed"),
        ([3.0, -1.0, 0.5, -0.5, 1.0], "undecided"),
        # One model far above the others widens the interval beyond 0.
        ([0.1, 0.1, 0.1, 0.1, 9.0], "undecided"),
        ([1.0, math.nan, 1.0], "undecided"),
        ([1.0, math.inf], "undecided"),
        # Equal values, and one model, have no spread.
        ([0.2, 0.2, 0.2], "passed"),
        ([0.0, 0.0], "failed"),
        ([0.2], "passed"),
        ([-0.2], "failed"),
    ],
)
def test_a_margin_passes_or_fails_only_if_its_interval_excludes_zero(margins, verdict):
    assert verdicts.of_margins(margins) == verdict


def test_the_interval_is_that_of_the_t_distribution():
    # n = 5: t(0.975, 4) = 2.776; the standard error of 1..5 is sqrt(2.5 / 5).
    low, high = verdicts.mean_interval([1, 2, 3, 4, 5])
    assert (low, high) == pytest.approx((3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)), rel=1e-6)


def test_models_without_an_effect_pass_no_more_often_than_by_chance():
    rng = np.random.default_rng(0)
    one = [verdicts.of_margins(rng.normal(size=5)) for _ in range(1000)]
    assert one.count("passed") <= 40 and one.count("failed") <= 40
    best_of_six = [verdicts.of_best(dict(enumerate(rng.normal(size=(6, 5)))))[0] for _ in range(400)]
    assert best_of_six.count("passed") <= 20


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ({"a": [1.0, 1.1, 0.9], "b": [-1.0, -1.1, -0.9]}, ("passed", "a")),
        ({"a": [-2.0, -2.1, -1.9], "b": [-1.0, -1.1, -0.9]}, ("failed", "b")),
        ({"a": [-2.0, -2.1, -1.9], "b": [-1.0, 1.1, 0.9]}, ("undecided", "a")),
        # The alternative that passes is reported, not the one of the largest mean.
        ({"a": [1.0, 1.1, 0.9], "b": [9.0, -4.0, 8.0]}, ("passed", "a")),
    ],
)
def test_alternatives_fail_only_together(margins, expected):
    assert verdicts.of_best(margins) == expected


@pytest.mark.parametrize(
    ("held", "verdict"), [([True, True], "passed"), ([False, True], "undecided"), ([False, False], "failed")]
)
def test_a_property_of_models_is_decided_by_all_or_none(held, verdict):
    assert verdicts.of_each(held) == verdict


@pytest.mark.parametrize(
    ("troubled", "runs", "verdict"), [(0, 18, "passed"), (1, 18, "undecided"), (6, 18, "failed"), (1, 1, "undecided")]
)
def test_runs_in_trouble_fail_only_if_their_share_is_significantly_above_the_limit(troubled, runs, verdict):
    assert verdicts.of_trouble(troubled, runs) == verdict


@pytest.mark.parametrize(
    ("p_value", "share", "other", "verdict"),
    [
        (0.04, 0.6, 0.1, "passed"),
        (0.06, 0.5, 0.2, "undecided"),
        (0.97, 0.1, 0.6, "failed"),
        (0.9, 0.1, 0.3, "undecided"),
        # Every run of both groups: the test has nothing to compare.
        (1.0, 1.0, 1.0, "undecided"),
        (1.0, 0.0, 0.0, "failed"),
    ],
)
def test_a_comparison_of_groups_needs_a_significant_difference(p_value, share, other, verdict):
    assert verdicts.of_comparison(p_value, share, other) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 2.0, "passed"), (-2.0, -0.1, "failed"), (-0.1, 0.1, "undecided")]
)
def test_one_model_is_judged_by_its_own_interval(low, high, verdict):
    assert verdicts.of_interval(low, high) == verdict
