"""Precisions of training: what is bfloat16 or fp8 and what stays fp32, in eager and compiled passes."""

import pytest
import torch
from torch import Tensor, nn

from gpt2.model import fp8
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Precision, autocast
from gpt2.model.gpt import GPT

NORMS = ("preln", "postln", "deepnorm")
# Precision of the passes by setting.
SETTINGS: dict[str, Precision] = {
    "float32": "float32",
    "bfloat16_mixed": "bfloat16_mixed",
    "bfloat16": "bfloat16",
    "fp8_head": "bfloat16",
}


def make_model(setting: str, norm: str = "preln") -> tuple[GPT, Precision]:
    """A small model as the setting trains it, and the precision of its passes."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, norm=norm, vocab_size=500)
    model = GPT(config, seed=1)
    model.residual_in_fp32 = setting == "bfloat16_mixed"
    model.fp8_head = setting == "fp8_head"
    return model, SETTINGS[setting]


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(500, (4, 33), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def gradients_of(model: nn.Module, forward, precision: Precision) -> tuple[float, Tensor]:
    with autocast(torch.device("cpu"), precision):
        loss = forward(*make_batch())
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_compiled_step_equals_the_eager_step(setting, norm):
    results = []
    for compiled in (False, True):
        model, precision = make_model(setting, norm)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        results.append(gradients_of(model, forward, precision))
    (eager, eager_gradient), (compiled, compiled_gradient) = results
    assert compiled == pytest.approx(eager, rel=1e-6)
    # Compiled and eager passes may add the same bfloat16 numbers in another order.
    assert (compiled_gradient - eager_gradient).norm() <= 0.02 * eager_gradient.norm()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("setting", "tolerance"), [("bfloat16_mixed", 0.02), ("bfloat16", 0.03), ("fp8_head", 0.1)])
def test_each_precision_approximates_the_gradients_of_float32(setting, tolerance, norm):
    exact, (model, precision) = make_model("float32", norm)[0], make_model(setting, norm)
    loss, gradient = gradients_of(exact, exact, "float32")
    coarse_loss, coarse = gradients_of(model, model, precision)
    assert coarse_loss == pytest.approx(loss, rel=2e-3)
    assert 0 < (coarse - gradient).norm() <= tolerance * gradient.norm()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("setting", "dtype"), [("bfloat16", torch.bfloat16), ("bfloat16_mixed", torch.float32)])
def test_the_residual_stream_has_the_precision_of_the_setting(setting, dtype, norm):
    model, precision = make_model(setting, norm)
    seen = []
    for block in model.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with autocast(torch.device("cpu"), precision):
        model.hidden(make_batch()[0])
    assert set(seen) == {(dtype, dtype)}


def test_fp8_serves_training_alone():
    model, precision = make_model("fp8_head")
    plain, _ = make_model("bfloat16")
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        assert torch.equal(model(*make_batch()), plain(*make_batch()))


def test_zeros_and_the_largest_number_survive_fp8():
    for row in ([0.0, 0.0], [1e30, -1e30], [1e-20, 0.0]):
        found = fp8.quantise(torch.tensor(row))
        torch.testing.assert_close(found.values.float() * found.scale, torch.tensor(row))
