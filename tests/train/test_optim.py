"""Matrices decay, vectors do not, each once; the learning rate equals a hand-computed curve."""

import math

import pytest
import torch
from pydantic import ValidationError

from gpt2.train.muon import Muon
from gpt2.train.optim import OptimConfig, build_optimizer, decay_groups, lr_at
from tests.analysed import make_model, make_windows

DECAY = 0.25


def make_config(**changed) -> OptimConfig:
    values = {"beta1": 0.8, "beta2": 0.9, "weight_decay": DECAY, "grad_clip": 1.0}
    schedule = {"max_steps": 12, "max_lr": 1.0, "min_lr": 0.1, "warmup_steps": 4}
    return OptimConfig(**{**values, **schedule, **changed})


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_every_parameter_is_in_the_one_group_of_its_kind(norm):
    model = make_model(norm)
    decayed, plain = decay_groups(list(model.parameters()), DECAY)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (DECAY, 0.0)
    found = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight") and "ln_" not in names[id(parameter)]
    for parameter in plain["params"]:
        assert names[id(parameter)].endswith("bias") or "ln_" in names[id(parameter)]


def test_the_first_step_is_that_of_adamw():
    model, windows = make_model(), make_windows(2)
    optimizer = build_optimizer(model, make_config(max_lr=0.01, min_lr=0.0))
    model(windows[:, :-1], windows[:, 1:]).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Corrected for their start at zero, both averages equal the first gradient: a step of lr × sign.
        gradient = parameter.grad
        decay = DECAY if parameter.dim() == 2 else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, windows = make_model(), make_windows(2)
    optimizer = build_optimizer(model, make_config(optimizer="muon", max_lr=0.01, min_lr=0.0))
    model(windows[:, :-1], windows[:, 1:]).backward()
    optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    by_muon = {names[id(p)] for p, state in optimizer.state.items() if state.keys() == {"momentum_buffer"}}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"h.{layer}.{name}.weight" for layer in range(len(model.h)) for name in matrices}
    assert len(optimizer.state) == len(names)


def test_the_first_step_of_muon_is_the_orthogonal_factor_of_the_gradient():
    model, windows = make_model(), make_windows(2)
    optimizer = build_optimizer(model, make_config(optimizer="muon", max_lr=0.01, min_lr=0.0))
    model(windows[:, :-1], windows[:, 1:]).backward()
    weight = model.h[0].mlp.c_fc.weight
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    U, _, V = torch.linalg.svd(gradient, full_matrices=False)
    scale = 0.01 * 0.2 * math.sqrt(max(weight.shape))
    step = (before * (1 - 0.01 * DECAY) - weight.detach()) / scale
    # Five iterations bring the singular values near 1, not to it.
    singular = torch.linalg.svdvals(step)
    assert singular.max() < 1.3 and singular.median() > 0.6
    cosine = torch.nn.functional.cosine_similarity(step.flatten(), (U @ V).flatten(), dim=0)
    assert cosine > 0.9


def test_steps_of_muon_are_those_of_torch_but_for_rounding():
    shapes = [(24, 8), (8, 8), (8, 24), (24, 8), (16, 8)]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.ones(shape, requires_grad=True) for shape in shapes] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.01, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        # Steps move a weight by about 0.01; torch's iteration rounds to bfloat16.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
        assert (a - 1).abs().max() > 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_dropped_for_every_parameter(optimizer):
    model, windows = make_model(), make_windows(2)
    built = build_optimizer(model, make_config(optimizer=optimizer))
    model(windows[:, :-1], windows[:, 1:]).backward()
    built.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    upper, lower = (0.1 + 0.9 * (1 + sign * math.sqrt(0.5)) / 2 for sign in (1, -1))
    by_hand = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: upper, 8: 0.55, 10: lower, 12: 0.1}
    assert {step: lr_at(step, make_config()) for step in by_hand} == pytest.approx(by_hand, rel=1e-12)


def test_without_warm_up_the_rate_falls_from_the_highest_or_is_constant():
    rates = [lr_at(step, make_config(warmup_steps=0)) for step in range(12)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and min(rates) > 0.1
    assert {lr_at(step, make_config(warmup_steps=0, min_lr=1.0)) for step in range(12)} == {1.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"min_lr": 2.0}, "min_lr=2.0 .* max_lr=1.0; lower"),
        ({"warmup_steps": 12}, "warmup_steps=12 .* max_steps=12; shorten"),
        ({"max_lr": 0.0}, "max_lr"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 0.0}, "beta2"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_an_impossible_schedule_is_refused_by_name(changed, named):
    with pytest.raises(ValidationError, match=named):
        make_config(**changed)
