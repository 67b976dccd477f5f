"""Orders that score the model again: greedy search on a shortlist, and Taylor scores of the heads left."""

import pytest
import torch

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.evaluate import mean_loss
from gpt2.prune import iterative
from gpt2.prune.criteria import make_masks, mask_heads, order_by_score, score_taylor
from gpt2.prune.iterative import order_by_loss, order_by_taylor_again
from gpt2.prune.remove import remove_heads
from tests.analysed import NORMS, make_model, make_windows


@pytest.fixture
def windows() -> torch.Tensor:
    return make_windows(5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_greedy_search_removes_the_cheapest_head_of_the_eight_lowest_taylor_scores_left(norm, windows):
    model = make_model(norm)
    taylor = score_taylor(model, windows, 5)
    order = order_by_loss(model, taylor, windows, 5, batch_size=2)
    assert len(set(order)) == 5
    for step, head in enumerate(order):
        shortlist = [other for other in order_by_score(taylor) if other not in order[:step]][:8]
        # Removed here, masked there.
        losses = {other: mean_loss(remove_heads(model, [*order[:step], other]), windows, 5) for other in shortlist}
        assert losses[head] == pytest.approx(min(losses.values()), abs=1e-6)


def test_the_greedy_search_does_not_depend_on_the_batch_size_and_leaves_the_model(windows):
    model = make_model("postln")
    taylor = score_taylor(model, windows, 5)
    with torch.no_grad():
        before = model(windows[:, :-1])
        orders = [order_by_loss(model, taylor, windows, 4, batch_size) for batch_size in (1, 3, 5)]
        assert torch.equal(model(windows[:, :-1]), before)
    assert orders[0] == orders[1] == orders[2]


def test_ties_go_to_the_lower_taylor_score(windows):
    model = make_model()
    for head in (Head(2, 3), Head(1, 2)):
        model.h[head.layer].attn.c_proj.weight.data.unflatten(1, (4, 8))[:, head.index] = 0
        model.h[head.layer].attn.c_attn.weight.data.unflatten(0, (3, 4, 8))[2, head.index] = 0
    taylor = [torch.ones(4), torch.tensor([1.0, 1.0, 0.2, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.1])]
    order = order_by_loss(model, taylor, windows, 12, 5)
    assert sorted(order) == list_heads(model.config)
    # Either head's removal changes no bit, so each goes when no other one lowers the loss.
    assert order.index(Head(2, 3)) < order.index(Head(1, 2))


def test_each_step_passes_only_the_layers_from_the_head_on(windows, monkeypatch):
    model, passed = make_model(), []
    taylor = [torch.arange(4), torch.arange(4), torch.full((4,), 9)]
    for layer, block in enumerate(model.h):
        block.register_forward_hook(lambda *call, layer=layer: passed.append(layer))
    order_by_loss(model, taylor, windows, 1, batch_size=5)
    # The shortlist has the heads of the first two layers; one more pass computes the states.
    assert [passed.count(layer) for layer in range(3)] == [4 + 1, 8 + 1, 8 + 1]


def test_taylor_is_taken_again_without_the_heads_that_are_gone(windows):
    model = make_model()
    taylor = score_taylor(model, windows, 5)
    order = order_by_taylor_again(model, taylor, windows, [0, 2, 5, 9], batch_size=5)
    assert order[:2] == order_by_score(taylor)[:2] and len(set(order)) == 9
    for first, last in ((2, 5), (5, 9)):
        with mask_heads(model, make_masks(model, order[:first])):
            again = score_taylor(model, windows, 5)
        left = [head for head in order_by_score(again) if head not in order[:first]]
        assert order[first:last] == left[: last - first]
    assert order[:5] != order_by_score(taylor)[:5]


def test_taylor_is_taken_once_for_a_single_count(windows, monkeypatch):
    model = make_model()
    taylor = score_taylor(model, windows, 5)
    monkeypatch.setattr(iterative, "score_taylor", None)
    assert order_by_taylor_again(model, taylor, windows, [0, 4], 5) == order_by_score(taylor)[:4]
