"""A key is new once, whatever came before it, and the table stays within the memory it promises."""

import numpy as np
import pytest

from gpt2.prepare.dedup import FIRST_SLOTS, MOST_FULL, SeenKeys


def random_keys(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def test_the_first_of_equal_keys_is_new_within_a_batch_and_across():
    seen = SeenKeys()
    assert seen.add(np.array([5, 7, 5, 5, 9], np.uint64)).tolist() == [True, True, False, False, True]
    assert seen.add(np.array([9, 8, 8, 5], np.uint64)).tolist() == [False, True, False, False]
    assert seen.add(np.array([], np.uint64)).tolist() == []


@pytest.mark.parametrize("spread", [2**64, 300_000, 1000], ids=["rare", "some", "many"])
def test_a_python_set_says_the_same(spread):
    seen, expected = SeenKeys(), set()
    rng = np.random.default_rng(1)
    for _ in range(200):
        keys = rng.integers(0, spread, 1000, dtype=np.uint64) * np.uint64(1 if spread == 2**64 else 0x9E3779B97F4A7C15)
        fresh = []
        for key in np.maximum(keys, 1).tolist():
            fresh.append(key not in expected)
            expected.add(key)
        assert seen.add(keys).tolist() == fresh


def test_keys_that_want_the_same_slot_are_all_kept():
    keys = np.arange(1, 2001, dtype=np.uint64) << np.uint64(32)
    seen = SeenKeys()
    assert seen.add(keys).all()
    assert not seen.add(keys[::-1]).any()


def test_the_end_of_the_table_goes_on_at_its_beginning():
    keys = np.array([FIRST_SLOTS - 1, 2 * FIRST_SLOTS - 1, 3 * FIRST_SLOTS - 1], np.uint64)
    seen = SeenKeys()
    assert seen.add(keys).all() and not seen.add(keys).any()


def test_memory_is_within_22_bytes_a_key():
    seen = SeenKeys()
    most = 0.0
    for number in range(400):
        seen.add(random_keys(number, 1000))
        if (n_keys := 1000 * (number + 1)) > MOST_FULL * FIRST_SLOTS:
            most = max(most, seen._slots.nbytes / n_keys)
    assert 8 / MOST_FULL < most < 22
