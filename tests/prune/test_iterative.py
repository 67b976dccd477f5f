"""Orders that look at the model again: the greedy search is exact, and Taylor scores are those of what is left."""

import pytest
import torch

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune import iterative
from gpt2.prune.criteria import mask_heads, order_by_score, score_taylor
from gpt2.prune.iterative import order_by_loss, order_by_taylor_again
from gpt2.prune.remove import remove_heads
from tests.analysed import make_model, make_windows


@pytest.fixture
def windows() -> torch.Tensor:
    return make_windows(5)


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_the_greedy_search_removes_the_cheapest_head_of_those_left(norm, windows):
    model = make_model(norm)
    order = order_by_loss(model, windows, 5, batch_size=2)
    assert len(set(order)) == 5
    for step, head in enumerate(order):
        left = [other for other in list_heads(model.config) if other not in order[:step]]
        # Removed for good here, masked there.
        losses = {other: mean_loss(remove_heads(model, [*order[:step], other]), windows, 5) for other in left}
        assert losses[head] == pytest.approx(min(losses.values()), abs=1e-6)


def test_the_greedy_search_does_not_depend_on_the_batch_size_and_leaves_the_model(windows):
    model = make_model("postln")
    with torch.no_grad():
        before = model(windows[:, :-1])
        orders = [order_by_loss(model, windows, 4, batch_size) for batch_size in (1, 3, 5)]
        assert torch.equal(model(windows[:, :-1]), before)
    assert orders[0] == orders[1] == orders[2]


def test_of_heads_without_effect_the_first_goes_first(windows):
    model = make_model()
    for head in (Head(2, 3), Head(1, 2)):
        model.h[head.layer].attn.c_proj.weight.data.unflatten(1, (4, 8))[:, head.index] = 0
        model.h[head.layer].attn.c_attn.weight.data.unflatten(0, (3, 4, 8))[2, head.index] = 0
    order = order_by_loss(model, windows, 12, 5)
    assert sorted(order) == list_heads(model.config)
    # Either head's removal changes no bit, so each goes when no other one lowers the loss.
    assert order.index(Head(1, 2)) < order.index(Head(2, 3))


def test_each_step_passes_only_what_lies_above(windows, monkeypatch):
    model, passed = make_model(), []
    for layer, block in enumerate(model.h):
        block.register_forward_hook(lambda *call, layer=layer: passed.append(layer))
    order_by_loss(model, windows, 1, batch_size=5)
    # Four heads a layer: twelve last layers, eight middle ones and four first ones, and one pass of the states.
    assert [passed.count(layer) for layer in range(3)] == [4 + 1, 8 + 1, 12 + 1]


def test_taylor_is_taken_again_without_the_heads_that_are_gone(windows):
    model = make_model()
    taylor = score_taylor(model, windows, 5)
    order = order_by_taylor_again(model, taylor, windows, [0, 2, 5, 9], batch_size=5)
    assert order[:2] == order_by_score(taylor)[:2] and len(set(order)) == 9
    for first, last in ((2, 5), (5, 9)):
        masks = [torch.ones(4) for _ in range(3)]
        for head in order[:first]:
            masks[head.layer][head.index] = 0
        with mask_heads(model, masks):
            again = score_taylor(model, windows, 5)
        left = [head for head in order_by_score(again) if head not in order[:first]]
        assert order[first:last] == left[: last - first]
    assert order[:5] != order_by_score(taylor)[:5]


def test_taylor_is_taken_once_for_a_single_count(windows, monkeypatch):
    model = make_model()
    taylor = score_taylor(model, windows, 5)
    monkeypatch.setattr(iterative, "score_taylor", None)
    assert order_by_taylor_again(model, taylor, windows, [0, 4], 5) == order_by_score(taylor)[:4]
