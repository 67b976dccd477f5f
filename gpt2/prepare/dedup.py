"""A compact hash set of 64-bit keys (11 to 22 bytes per key) for exact deduplication."""

import numpy as np

EMPTY = np.uint64(0)
FIRST_SLOTS = 2**16
# Beyond it the table doubles. Then the old one is still there: 32 bytes a key for a moment.
MOST_FULL = 0.75


class SeenKeys:
    """A set of 64-bit keys as a hash table of open addressing; keys should be hashes themselves."""

    def __init__(self):
        self._slots = np.zeros(FIRST_SLOTS, np.uint64)
        self._n_keys = 0

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add `keys` (N,) uint64 and return (N,) bool: whether each was not there, nor earlier in `keys`."""
        # The mark of an empty slot is no key.
        keys = np.maximum(keys, np.uint64(1))
        while self._n_keys + len(keys) > MOST_FULL * len(self._slots):
            self._grow()
        new = np.zeros(len(keys), bool)
        new[np.unique(keys, return_index=True)[1]] = True
        new[new] = self._insert(keys[new])
        self._n_keys += int(new.sum())
        return new

    def _grow(self) -> None:
        old = self._slots
        self._slots = np.zeros(2 * len(old), np.uint64)
        for part in np.split(old, range(FIRST_SLOTS, len(old), FIRST_SLOTS)):
            self._insert(part[part != EMPTY])

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        """Add distinct keys, all at once, and return whether each was not there."""
        new = np.zeros(len(keys), bool)
        last = np.uint64(len(self._slots) - 1)
        place = keys & last
        waiting = np.arange(len(keys))
        while len(waiting):
            found = self._slots[place[waiting]]
            into = waiting[found == EMPTY]
            # Of several keys for one empty slot the last stays.
            self._slots[place[into]] = keys[into]
            new[into] = self._slots[place[into]] == keys[into]
            waiting = waiting[(found != keys[waiting]) & ~new[waiting]]
            place[waiting] = (place[waiting] + np.uint64(1)) & last
        return new
