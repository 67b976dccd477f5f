"""Durations and sizes have the unit and the digits that a reader expects."""

import pytest

from gpt2.pipeline.quantities import show_size, show_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "< 0.1 s"), (0.31, "0.3 s"), (74, "74 s"), (130, "2.2 min"), (3600 * 46, "46 h")),
        *((86400 * 10, "10 days"), (1e9, "32 years")),
    ],
)
def test_a_duration_has_two_digits_or_more(seconds, text):
    assert show_time(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(500, "0.5 kB"), (4e5, "400 kB"), (2.5e7, "25.0 MB"), (4.17e10, "41.7 GB"), (1.2e12, "1.2 TB")],
)
def test_a_size_has_a_decimal_unit(n_bytes, text):
    assert show_size(n_bytes) == text
