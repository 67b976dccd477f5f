"""Redundancy rankings by other similarities than that of the attention patterns."""

from collections.abc import Mapping, Sequence

import numpy as np

from gpt2.heads.similarity import Head
from gpt2.prune.criteria import Order, order_by_redundancy

# Names of load_similarities; a criterion's name has the prefix.
SIMILAR_ORDERS = ("pattern_nosink", "output", "written", "qk", "ov")
SIMILARITY_PREFIX = "similarity_"


def rank_by_similarity(similarities: Mapping[str, np.ndarray], heads: Sequence[Head]) -> dict[str, list[Order]]:
    """The order of order_by_redundancy by each of SIMILAR_ORDERS; similarities are (M, M) each."""
    return {f"{SIMILARITY_PREFIX}{name}": [order_by_redundancy(similarities[name], heads)] for name in SIMILAR_ORDERS}
