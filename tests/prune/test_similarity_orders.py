"""Orders by similarity: the matrix of its name decides each."""

import numpy as np
import pytest

from gpt2.heads.similarity import SAVED_SIMILARITIES, list_heads
from gpt2.prune.criteria import SIMILAR_ORDERS, order_by_redundancy, rank_by_similarity
from tests.analysed import make_model


@pytest.fixture
def similarities() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(-1, 1, (12, 12)) for name in SAVED_SIMILARITIES}
    return {name: np.where(np.eye(12, dtype=bool), 1, (matrix + matrix.T) / 2) for name, matrix in values.items()}


def test_every_order_has_all_heads_and_goes_by_its_matrix(similarities):
    heads = list_heads(make_model().config)
    orders = rank_by_similarity(similarities, heads)
    assert list(orders) == [f"similarity_{name}" for name in SIMILAR_ORDERS]
    for name in SIMILAR_ORDERS:
        assert orders[f"similarity_{name}"] == [order_by_redundancy(similarities[name], heads)]
        assert sorted(orders[f"similarity_{name}"][0]) == heads
