"""Orders by similarity: each uses the matrix and the rule that its name says."""

import numpy as np
import pytest
import torch

from gpt2.heads.similarity import Head, capture_heads, list_heads
from gpt2.prune.criteria import order_by_redundancy
from gpt2.prune.repair import gather_moments
from gpt2.prune.similarity_orders import (
    ORDERED_SIMILARITIES,
    SIMILAR_ORDERS,
    order_by_distinct,
    order_pairs_by_score,
    rank_by_similarity,
    standardise_layers,
    written_sizes,
)
from tests.analysed import make_model, make_windows

HEADS = [Head(0, 0), Head(0, 1), Head(0, 2), Head(1, 0), Head(1, 1), Head(1, 2)]


def make_similarity(pairs: dict[tuple[int, int], float], n: int = 6) -> np.ndarray:
    similarity = np.eye(n)
    for (i, j), value in pairs.items():
        similarity[i, j] = similarity[j, i] = value
    return similarity


def random_similarities(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for name in ("pattern", *ORDERED_SIMILARITIES):
        values = rng.uniform(-1, 1, (12, 12))
        found[name] = np.where(np.eye(12, dtype=bool), 1, (values + values.T) / 2)
    return found


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_every_order_has_all_heads_and_its_matrix_alone_decides(norm):
    model, similarities = make_model(norm), random_similarities()
    heads, moments = list_heads(model.config), gather_moments(model, make_windows(4), 4)
    taylor = [torch.rand(4, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    orders = rank_by_similarity(model, similarities, taylor, moments)
    assert tuple(orders) == SIMILAR_ORDERS
    assert all(sorted(order) == heads for order in orders.values())
    for name in ORDERED_SIMILARITIES:
        assert orders[name] == order_by_redundancy(similarities[name], heads)
    uses = {"pattern_in_layer": "pattern", "circuits": "qk", "written_taylor": "written", "written_distinct": "written"}
    for changed in ("pattern", *ORDERED_SIMILARITIES):
        others = rank_by_similarity(model, similarities | {changed: random_similarities(1)[changed]}, taylor, moments)
        for name in SIMILAR_ORDERS:
            used = {uses.get(name, name)} | ({"ov"} if name == "circuits" else set())
            # Sizes may differ by so much that they decide alone.
            assert others[name] == orders[name] or changed in used
            assert others[name] != orders[name] or changed not in used or name == "written_distinct"


def test_layers_are_put_on_one_scale():
    # The pairs of the second layer are much more alike, as all its heads are; in the first one pair stands out.
    similarity = make_similarity({(0, 1): 0.5, (0, 2): 0.1, (1, 2): 0.1, (3, 4): 0.92, (3, 5): 0.9, (4, 5): 0.88})
    found = standardise_layers(similarity, HEADS)
    for pairs in (((0, 1), (0, 2), (1, 2)), ((3, 4), (3, 5), (4, 5))):
        values = np.array([found[pair] for pair in pairs])
        assert (values.mean(), values.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    assert np.array_equal(found, found.T) and not found[:3, 3:].any()
    assert order_by_redundancy(similarity, HEADS)[0].layer == 1
    assert order_by_redundancy(found, HEADS)[0].layer == 0


def test_a_layer_of_equal_pairs_or_of_one_head_says_nothing():
    similarity = make_similarity({(0, 1): 0.7, (0, 2): 0.7, (1, 2): 0.7}, n=4)
    assert not standardise_layers(similarity, HEADS[:4]).any()


def test_of_the_most_similar_pair_the_head_of_the_lower_score_goes():
    similarity = make_similarity({(0, 1): 0.9, (0, 2): 0.6, (1, 2): 0.1, (3, 4): 0.8, (3, 5): 0.2, (2, 3): 0.99})
    scores = np.array([1.0, 2.0, 3.0, 0.5, 0.5, 9.0])
    # 0-1: 0 goes, of score 1. 3-4 are equal: the later goes. 3-5: 3 goes. 1-2: 1. One head a layer is left: 2 and 5.
    expected = [HEADS[i] for i in (0, 4, 3, 1, 2, 5)]
    assert order_pairs_by_score(similarity, scores, HEADS) == expected


def test_the_head_that_adds_least_beside_its_twin_goes():
    similarity = make_similarity({(0, 1): -0.8, (0, 2): 0.6, (1, 2): 0.0, (3, 4): 0.28, (3, 5): 0.0, (4, 5): 0.0})
    sizes = np.array([2.0, 3.0, 1.0, 1.5, 4.0, 5.0])
    # Sines to the twins, of which an opposite one is as good: 0 and 1 have 0.6, 2 has 0.8, 3 and 4 have 0.96, 5 has 1.
    # Parts 1.2, 1.8, 0.8, 1.44, 3.84, 5. Without 2 and 0, 1 is alone with its whole 3, as is 4 without 3.
    expected = [HEADS[i] for i in (2, 0, 3, 1, 4, 5)]
    assert order_by_distinct(similarity, sizes, HEADS) == expected


def test_sizes_are_those_of_what_the_heads_write():
    model, windows = make_model("postln"), make_windows(6)
    sizes = written_sizes(model, gather_moments(model, windows, 4))
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(windows[:, :-1])
    expected = []
    for block, outputs in zip(model.h, captured.output, strict=True):
        columns = block.attn.c_proj.weight.unflatten(1, (4, 8))
        written = torch.einsum("bthd,chd->bthc", outputs, columns)
        expected += written.square().sum(-1).mean((0, 1)).sqrt().tolist()
    assert sizes == pytest.approx(expected, rel=1e-4)
