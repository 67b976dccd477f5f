"""The mean loss is that of the whole set, however it is batched or shared, and only for the model's own tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt2.model.dist import Dist
from gpt2.model.evaluate import mean_loss, require_fit, window_losses
from gpt2.pipeline.files import UserError
from tests.analysed import BLOCK_SIZE, make_model, make_windows

N_WINDOWS = 7


@pytest.fixture
def windows():
    return make_windows(N_WINDOWS)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_losses_equal_the_cross_entropy_of_the_logits(windows, batch_size):
    model = make_model()
    with torch.no_grad():
        logits = model(windows[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    losses = window_losses(model, windows, batch_size)
    assert losses.shape == (N_WINDOWS, BLOCK_SIZE)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert mean_loss(model, windows, batch_size) == pytest.approx(expected.double().mean().item(), rel=1e-6)


class Process(Dist):
    """One of several processes that are run one after another: its sums are its own part."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("world_size", [1, 2, 4, 11])
def test_parts_of_all_processes_add_up_to_the_whole_even_where_some_have_none(windows, world_size):
    model = make_model("postln")
    parts = [
        mean_loss(model, windows, 2, dist=Process(rank, rank, world_size, torch.device("cpu")))
        for rank in range(world_size)
    ]
    assert parts.count(0.0) == max(0, world_size - N_WINDOWS)
    assert math.fsum(parts) == pytest.approx(mean_loss(model, windows, 2), rel=1e-6)


def test_mixed_precision_loses_little_and_leaves_the_weights_as_they_are(windows):
    model = make_model()
    exact = mean_loss(model, windows, 3)
    mixed = mean_loss(model, windows, 3, precision="bfloat16")
    # bfloat16 has eight bits; the errors of single tokens average out.
    assert mixed == pytest.approx(exact, rel=0.01)
    assert mixed != exact
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert window_losses(model, windows, 3, "bfloat16").dtype == torch.float32


def test_evaluation_keeps_no_graph(windows):
    assert not window_losses(make_model(), windows, 3).requires_grad


def test_tokens_of_another_vocabulary_are_refused_with_both_sizes(write_tokens):
    tokens = write_tokens(range(10), split="val")
    with pytest.raises(UserError, match=r"the model has vocab_size=97, .*tokens/val was made with gpt2 of 5000; run"):
        require_fit(make_model(), tokens)
