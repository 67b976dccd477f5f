"""Durations and sizes have the unit and the digits that a reader expects."""

import pytest

from gpt2.pipeline.quantities import show_size, show_time


@pytest.mark.parametrize(
    ("show", "quantity", "text"),
    [
        *(
            (show_time, 0.04, "< 0.1 s"),
            (show_time, 0.31, "0.3 s"),
            (show_time, 74, "74 s"),
            (show_time, 130, "2.2 min"),
        ),
        *((show_time, 3600 * 46, "46 h"), (show_time, 86400 * 10, "10 days"), (show_time, 1e9, "32 years")),
        *((show_size, 500, "0.5 kB"), (show_size, 4e5, "400 kB"), (show_size, 2.5e7, "25.0 MB")),
        *((show_size, 4.17e10, "41.7 GB"), (show_size, 1.2e12, "1.2 TB")),
    ],
)
def test_a_quantity_has_a_unit_and_two_digits_or_more(show, quantity, text):
    assert show(quantity) == text
