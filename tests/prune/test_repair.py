"""Repairs of pruned models: exact where they can be, better than none elsewhere."""

import copy

import numpy as np
import pytest
import torch

from gpt2.heads.similarity import Head, capture_heads
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model, save_model
from gpt2.pipeline.files import UserError
from gpt2.prune import repair
from gpt2.prune.remove import remove_heads
from gpt2.sampling.sampling import SamplingConfig, draw_tokens
from tests.analysed import NORMS, REMOVED, make_model, make_windows, slice_head

RIDGE = 1e-3
REPAIRS = ("mean", "refit", "stepwise", "merge", "merge_refit")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return make_windows(40, seed=6)


@pytest.fixture(scope="module")
def similarity() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (12, 12))


def apply(name: str, model: GPT, order: list[Head], similarity: np.ndarray, windows: torch.Tensor) -> GPT:
    return repair.remove_and_repair(
        model, order, name, repair.gather_calibration(model, windows, 16, RIDGE, similarity)
    )


@torch.no_grad()
def attention_errors(model: GPT, changed: GPT, windows: torch.Tensor) -> list[torch.Tensor]:
    """Error (B, T, C) of each layer's attention output, both given the input that the model has."""
    errors = []
    hooks = [
        block.attn.register_forward_hook(
            lambda module, args, output, other=other: errors.append((output - other.attn(*args)).double())
        )
        for block, other in zip(model.h, changed.h, strict=True)
    ]
    model.hidden(windows[:, :-1])
    for hook in hooks:
        hook.remove()
    return errors


def squared_errors(model: GPT, changed: GPT, windows: torch.Tensor) -> list[float]:
    """Mean squares of attention_errors."""
    return [error.square().mean().item() for error in attention_errors(model, changed, windows)]


def copy_pattern(model: GPT, layer: int, source: int, target: int) -> None:
    """Give the head `target` the queries and keys of `source`."""
    for ours, theirs in zip(*(slice_head(model, Head(layer, index))[:2] for index in (target, source)), strict=True):
        ours[:2] = theirs[:2]


def value_rows(model: GPT, head: Head) -> torch.Tensor:
    """View of the rows (D, C) of c_attn that make the values of a head."""
    return slice_head(model, head)[0][2]


def columns(model: GPT, head: Head) -> torch.Tensor:
    """View of the columns (C, D) of c_proj of a head."""
    return slice_head(model, head)[2]


def test_repair_without_removal_changes_no_bit(similarity, windows):
    model = make_model("postln")
    moments = repair.gather_moments(model, windows, 16)
    for same in (
        *(apply(name, model, [], similarity, windows) for name in REPAIRS),
        repair.refit(model, [], moments, RIDGE),
        repair.merge(model, [], similarity, moments),
        repair.refit_stepwise(model, copy.deepcopy(model), windows, 16, RIDGE),
    ):
        assert same.config == model.config
        assert all(torch.equal(tensor, same.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_refit_is_exact_where_the_others_say_what_a_head_says(norm, windows):
    """Two heads of one layer have the pattern of a third, and values that are its values transformed."""
    model = make_model(norm)
    generator = torch.Generator().manual_seed(9)
    for index in (1, 3):
        copy_pattern(model, 1, source=0, target=index)
        mix = torch.randn(8, 8, generator=generator)
        value_rows(model, Head(1, index)).copy_(mix @ value_rows(model, Head(1, 0)))
    removed = [Head(1, 1), Head(1, 3)]
    moments = repair.gather_moments(model, windows, 16)
    # The ridge holds back a share of about 1e-9 times the condition of the covariance.
    refitted = repair.refit(model, removed, moments, ridge=1e-9)
    unseen = make_windows(5, seed=8)
    whole = mean_loss(model, unseen, 5)
    assert mean_loss(refitted, unseen, 5) == pytest.approx(whole, abs=1e-5)
    assert abs(mean_loss(remove_heads(model, removed), unseen, 5) - whole) > 1e-2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_refit_never_raises_the_error_on_its_tokens(norm, ridge, windows):
    model = make_model(norm)
    moments = repair.gather_moments(model, windows, 16)
    removed = [*REMOVED, Head(2, 1), Head(2, 3)]
    plain = squared_errors(model, remove_heads(model, removed), windows)
    refitted = squared_errors(model, repair.refit(model, removed, moments, ridge), windows)
    assert all(after < before for after, before in zip(refitted, plain, strict=True))


def test_a_strong_ridge_leaves_the_weights_and_a_weak_one_finds_least_squares(windows):
    model = make_model()
    removed, kept = [Head(0, 2)], [0, 1, 3]
    moments = repair.gather_moments(model, windows, 16)
    strong = repair.refit(model, removed, moments, ridge=1e9).h[0].attn.c_proj
    torch.testing.assert_close(strong.weight, remove_heads(model, removed).h[0].attn.c_proj.weight)
    weak = repair.refit(model, removed, moments, ridge=1e-12).h[0].attn.c_proj
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(windows[:, :-1])
    outputs = captured.output[0].flatten(0, 1).double()
    written = outputs.flatten(1) @ model.h[0].attn.c_proj.weight.double().t() + model.h[0].attn.c_proj.bias.double()
    inputs = torch.cat([outputs[:, kept].flatten(1), torch.ones(len(outputs), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(inputs, written).solution
    torch.testing.assert_close(weak.weight.double(), expected[:-1].t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weak.bias.double(), expected[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_mean_repair_keeps_the_weights_and_the_mean_of_each_layer(norm, similarity, windows):
    model = make_model(norm)
    plain, repaired = remove_heads(model, REMOVED), apply("mean", model, REMOVED, similarity, windows)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, repaired.state_dict()[name]) or name.endswith("attn.c_proj.bias")
    assert max(error.mean((0, 1)).abs().max() for error in attention_errors(model, repaired, windows)) < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("removed", [[Head(1, 2)], REMOVED[1:]], ids=["a head", "all heads"])
def test_both_refits_agree_where_nothing_went_astray_before(norm, removed, windows):
    model = make_model(norm)
    once = repair.refit(model, removed, repair.gather_moments(model, windows, 16), RIDGE)
    stepwise = repair.refit_stepwise(model, remove_heads(model, removed), windows, 16, RIDGE)
    # The layer before lost nothing. The errors of the second way are computed in fp32.
    for layer in (0, 1):
        for one, other in zip(once.h[layer].parameters(), stepwise.h[layer].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(stepwise.h[0].attn.c_proj.weight, model.h[0].attn.c_proj.weight)
    assert not torch.equal(stepwise.h[2].attn.c_proj.weight, model.h[2].attn.c_proj.weight)


@pytest.mark.parametrize("norm", NORMS)
def test_a_stepwise_refit_ends_nearer_to_the_model(norm, windows):
    model = make_model(norm)
    removed = [Head(0, 1), Head(0, 3), Head(1, 0)]
    once = repair.refit(model, removed, repair.gather_moments(model, windows, 16), RIDGE)
    stepwise = repair.refit_stepwise(model, remove_heads(model, removed), windows, 16, RIDGE)
    with torch.no_grad():
        hidden = model.hidden(windows[:, :-1])
        errors = [(found.hidden(windows[:, :-1]) - hidden).square().mean() for found in (stepwise, once)]
    assert errors[0] < 0.98 * errors[1]


def test_a_layer_without_heads_keeps_the_mean_of_what_it_wrote(similarity, windows):
    model = make_model()
    for name in REPAIRS:
        repaired = apply(name, model, REMOVED[1:], similarity, windows)
        assert repaired.h[1].attn.n_head == 0
        assert attention_errors(model, repaired, windows)[1].mean((0, 1)).abs().max() < 1e-5


def make_twins(model: GPT, layer: int, heads: list[int], rank: int) -> None:
    """Give heads of a layer one pattern and value/output circuits that sum up to this rank."""
    for head in heads[1:]:
        copy_pattern(model, layer, source=heads[0], target=head)
    generator = torch.Generator().manual_seed(2)
    basis = 0.3 * torch.randn(rank, 32, generator=generator)
    for head in heads:
        value_rows(model, Head(layer, head)).copy_(torch.randn(8, rank, generator=generator) @ basis)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", [[Head(1, 1)], [Head(1, 1), Head(1, 2)], [Head(1, 1), Head(1, 0)]], ids=str)
def test_merge_is_exact_for_equal_patterns_and_low_rank(norm, order, windows):
    """Heads 0, 1 and 2 of the layer are alike; 1 goes to 0 or, if 0 goes after it, with 0 to 2."""
    model = make_model(norm)
    make_twins(model, 1, [0, 1, 2], rank=8)
    similarity = np.eye(12)
    similarity[5, 4], similarity[6, 4], similarity[4, 6], similarity[4, 7] = 0.9, 0.8, 0.7, 0.1
    merged = repair.merge(model, order, similarity, repair.gather_moments(model, windows, 16))
    unseen = make_windows(5, seed=8)
    assert mean_loss(merged, unseen, 5) == pytest.approx(mean_loss(model, unseen, 5), abs=1e-5)
    assert merged.config.heads == (4, 4 - len(order), 4)
    assert squared_errors(model, remove_heads(model, order), unseen)[1] > 1e-2


def test_merge_keeps_what_varies_most_where_the_rank_is_higher(windows):
    """No projection of the sum of two heads of one pattern onto D directions errs less on the calibration tokens."""
    model = make_model()
    make_twins(model, 1, [0, 1], rank=16)
    similarity = np.eye(12)
    similarity[5, 4] = 0.9
    merged = repair.merge(model, [Head(1, 1)], similarity, repair.gather_moments(model, windows, 16))
    error = squared_errors(model, merged, windows)[1]
    with torch.no_grad(), capture_heads(model) as captured:
        model.hidden(windows[:, :-1])
    written = sum(captured.output[1][:, :, h].double() @ columns(model, Head(1, h)).double().t() for h in (0, 1))
    written = written.flatten(0, 1)
    squares = torch.linalg.eigvalsh(torch.cov(written.t(), correction=0))
    assert error == pytest.approx(squares[:-8].sum().item() / 32, rel=1e-3)
    assert error < 0.5 * squared_errors(model, remove_heads(model, [Head(1, 1)]), windows)[1]


@pytest.mark.parametrize("norm", NORMS)
def test_refit_after_merge_ends_nearer_to_the_model(norm, similarity, windows):
    model = make_model(norm)
    order = [Head(0, 2), Head(2, 1), Head(2, 3), Head(1, 0)]
    with torch.no_grad():
        whole, merged, both = (
            changed.hidden(windows[:, :-1])
            for changed in (model, *(apply(name, model, order, similarity, windows) for name in REPAIRS[3:]))
        )
    assert (both - whole).square().mean() < 0.9 * (merged - whole).square().mean()


def test_heads_that_nothing_is_folded_into_stay_as_they_are(windows):
    model = make_model()
    similarity = np.eye(12)
    similarity[5, 4] = 0.9
    merged = repair.merge(model, [Head(1, 1)], similarity, repair.gather_moments(model, windows, 16))
    for before, after in ((Head(1, 2), Head(1, 1)), (Head(1, 3), Head(1, 2)), (Head(0, 1), Head(0, 1))):
        assert torch.equal(value_rows(model, before), value_rows(merged, after))
        assert torch.equal(columns(model, before), columns(merged, after))


def test_the_twin_is_the_most_similar_head_left_in_the_layer():
    heads = [Head(0, 0), Head(0, 1), Head(0, 2), Head(1, 0)]
    similarity = np.array([[1, 0.5, 0.7, 0.99], [0.5, 1, 0.6, 0.99], [0.7, 0.6, 1, 0.99], [0.99] * 3 + [1]])
    order = [Head(0, 0), Head(0, 2), Head(1, 0), Head(0, 1)]
    assert repair.pair_heads(order, similarity, heads) == [Head(0, 2), Head(0, 1), None, None]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", REPAIRS)
def test_repaired_models_survive_the_disk_and_generate(norm, name, similarity, windows, tmp_path):
    model = make_model(norm)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    repaired = apply(name, model, REMOVED, similarity, windows)
    assert repaired.config == remove_heads(model, REMOVED).config
    assert all(parameter.dtype == torch.float32 for parameter in repaired.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    save_model(repaired, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(windows[:2, :-1]), repaired(windows[:2, :-1]))
    sampling = SamplingConfig(max_tokens=30, num_seq=2)
    prompt = torch.tensor([5, 6])
    drawn = [list(draw_tokens(one, prompt, sampling, eot_token=0)) for one in (loaded, repaired)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", REPAIRS)
def test_the_batch_size_changes_rounding_alone(name, similarity, windows):
    model = make_model()
    calibrations = (repair.gather_calibration(model, windows, batch_size, RIDGE, similarity) for batch_size in (1, 40))
    one, other = (repair.remove_and_repair(model, REMOVED, name, calibration) for calibration in calibrations)
    with torch.no_grad():
        torch.testing.assert_close(one(windows[:4, :-1]), other(windows[:4, :-1]), rtol=0, atol=1e-4)


def test_a_head_that_never_varies_is_refitted_to_nothing(windows):
    model = make_model()
    for index in range(4):
        value_rows(model, Head(0, index)).zero_()
    refitted = repair.refit(model, [Head(0, 1)], repair.gather_moments(model, windows, 16), RIDGE)
    with torch.no_grad():
        torch.testing.assert_close(refitted(windows[:4, :-1]), model(windows[:4, :-1]), rtol=0, atol=1e-4)


def test_refuses_a_model_that_computes_no_numbers(windows):
    model = make_model()
    model.h[1].attn.c_attn.bias.data[70] = torch.nan
    with pytest.raises(UserError, match=r"NaN or infinity in its attention; lower train\.max_lr"):
        repair.gather_moments(model, windows, 16)
    with pytest.raises(UserError, match="NaN or infinity"):
        repair.refit_stepwise(model, remove_heads(model, [Head(0, 0)]), windows, 16, RIDGE)
