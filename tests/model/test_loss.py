"""The chunked cross-entropy equals F.cross_entropy in value and gradients, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2.model import loss
from gpt2.model.loss import linear_cross_entropy, token_losses

N_ROWS, WIDTH, VOCAB, PADDED = 50, 12, 77, 96
# Rows in one chunk of logits; the last chunk is shorter, and less than one row makes a chunk of one.
CHUNKS = pytest.mark.parametrize("rows", [0, 1, 7, 25, 50, 1000])


@pytest.fixture
def chunk_of(monkeypatch):
    """A function that sets the number of rows of a chunk."""
    return lambda rows: monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * 4 * PADDED)


def make_inputs(n_rows: int = N_ROWS, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n_rows, WIDTH), weight (PADDED, WIDTH) with padding that is not zero, targets (n_rows,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(n_rows, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    return hidden, weight, torch.randint(VOCAB, (n_rows,), generator=generator)


@CHUNKS
def test_value_and_gradients_equal_those_of_torch(rows, chunk_of):
    chunk_of(rows)
    hidden, weight, targets = make_inputs()
    results = []
    for loss_of in (
        lambda h, w: linear_cross_entropy(h, w, targets, VOCAB),
        lambda h, w: F.cross_entropy(h @ w[:VOCAB].t(), targets),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss_of(h, w)
        # As in gradient accumulation, the loss is scaled before the backward pass.
        (0.3 * value).backward()
        results.append((value, h.grad, w.grad))
    assert not results[0][2][VOCAB:].any()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@CHUNKS
def test_the_losses_of_tokens_are_those_of_torch_and_their_mean_is_the_loss(rows, chunk_of):
    chunk_of(rows)
    hidden, weight, targets = make_inputs()
    losses = token_losses(hidden, weight, targets, VOCAB)
    expected = F.cross_entropy(hidden @ weight[:VOCAB].t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            value = linear_cross_entropy(hidden.requires_grad_(), weight, targets, VOCAB)
        assert value.requires_grad == gradients
        torch.testing.assert_close(value.detach(), losses.mean())


def rounded(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """`x` as numbers of `dtype` times a scale hold it, in float64."""
    return (x / scale).to(dtype).double() * scale


@CHUNKS
def test_fp8_loss_and_gradients_are_those_of_the_rounded_operands(rows, chunk_of):
    chunk_of(rows)
    hidden, weight, targets = make_inputs(n_rows=64)
    hidden = hidden.bfloat16().float()
    scaled = [rounded(part, torch.float8_e4m3fn, part.abs().max().item() / 448) for part in (hidden, weight)]
    logits = (scaled[0] @ scaled[1].t()).bfloat16().double()
    logits[:, VOCAB:] = -torch.inf
    expected = F.cross_entropy(logits, targets)
    gradient = logits.softmax(1) - F.one_hot(targets, PADDED)
    gradient = rounded(gradient, torch.float8_e5m2, 2.0**-15) / len(hidden)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = linear_cross_entropy(h, w, targets, VOCAB, fp8=True)
    value.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    assert w.grad.dtype == torch.float32
    for ours, exact in ((h.grad, gradient @ scaled[1]), (w.grad, gradient.t() @ scaled[0])):
        # The products are rounded to bfloat16, and gradients next to a limit of e5m2 to the other side.
        assert (ours - exact).norm() < 0.01 * exact.norm()
    assert not w.grad[VOCAB:].any()


def test_the_fp8_loss_learns_what_the_exact_one_does():
    hidden, weight, targets = make_inputs()
    gradients = []
    for fp8 in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_cross_entropy(h, w, targets, VOCAB, fp8=fp8).backward()
        gradients.append((h.grad, w.grad))
    for exact, coarse in zip(*gradients, strict=True):
        assert F.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0) > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("chunk_bytes", [2**20, 2**31])
def test_the_fp8_kernel_of_a_gpu_computes_what_a_cpu_does(chunk_bytes, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cuda", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(208, 64, generator=generator), torch.randn(10112, 64, generator=generator)
    targets = torch.randint(10001, (208,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (part.to(device).requires_grad_() for part in (hidden.clone(), weight.clone()))
        with torch.autocast(device, torch.bfloat16):
            value = linear_cross_entropy(h, w, targets.to(device), 10001, fp8=True)
        value.backward()
        results.append([part.cpu() for part in (value, h.grad, w.grad)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        # Logits that differ in their last bit have gradients that e5m2 may round to neighbours, 25 % apart.
        assert (on_gpu - on_cpu).norm() <= 0.1 * on_cpu.norm()
    assert not results[1][2][10001:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("chunk_bytes", [2**12, 2**31])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_kernel_of_a_gpu_computes_what_a_cpu_does(dtype, tolerance, chunk_bytes, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cuda", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    # More columns than the kernel takes at a time, and padding that would win if it were not left out.
    hidden, weight = torch.randn(40, 64, generator=generator), torch.randn(10112, 64, generator=generator)
    weight[10001:] *= 100
    targets = torch.randint(10001, (40,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (part.to(dtype).float().clone().to(device).requires_grad_() for part in (hidden, weight))
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16 and device == "cuda"):
            value = linear_cross_entropy(h, w, targets.to(device), 10001)
        value.backward()
        losses = token_losses(h.detach(), w.detach(), targets.to(device), 10001)
        results.append([part.cpu() for part in (value, h.grad, w.grad, losses)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert (on_gpu - on_cpu).norm() <= tolerance * on_cpu.norm()
    assert not results[1][2][10001:].any()


def test_no_rows_have_no_losses_and_a_mean_that_is_not_a_number():
    hidden, weight, targets = make_inputs(n_rows=0)
    assert token_losses(hidden, weight, targets, VOCAB).shape == (0,)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, VOCAB).isnan()
    value = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, VOCAB)
    expected = F.cross_entropy(hidden @ weight[:VOCAB].t(), targets)
    torch.testing.assert_close(value, expected, equal_nan=True)
    grads, expected_grads = (torch.autograd.grad(mean, (hidden, weight)) for mean in (value, expected))
    torch.testing.assert_close(grads, expected_grads, equal_nan=True)


def test_padding_has_no_probability_however_large_its_weights_are():
    hidden, weight, targets = make_inputs()
    huge = weight.clone()
    huge[VOCAB:] = 1e4
    assert torch.equal(token_losses(hidden, huge, targets, VOCAB), token_losses(hidden, weight, targets, VOCAB))


def test_large_logits_neither_overflow_nor_lose_their_order():
    hidden, weight, targets = make_inputs(scale=1000.0)
    hidden.requires_grad_()
    value = linear_cross_entropy(hidden, weight, targets, VOCAB)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(hidden @ weight[:VOCAB].t(), targets))
    assert hidden.grad.isfinite().all()


def test_bfloat16_activations_with_fp32_weights_lose_only_their_own_precision(chunk_of):
    chunk_of(7)
    hidden, weight, targets = make_inputs()
    exact_hidden, exact_weight = hidden.bfloat16().float().requires_grad_(), weight.clone().requires_grad_()
    expected = F.cross_entropy(exact_hidden @ exact_weight[:VOCAB].t(), targets)
    expected.backward()
    rounded, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    value = linear_cross_entropy(rounded, weight, targets, VOCAB)
    value.backward()
    # bfloat16 has eight bits: one part in 256 of logits of order 10.
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0.01)
    assert (rounded.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    for ours, exact in ((rounded.grad.float(), exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (ours - exact).norm() < 0.03 * exact.norm()


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("gradients", [True, False])
def test_no_tensor_is_larger_than_a_chunk_of_logits(gradients, chunk_of):
    rows, n_rows = 32, 2000
    chunk_of(rows)
    hidden, weight, targets = make_inputs(n_rows)
    hidden.requires_grad_(gradients)
    weight.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients), LargestOutput() as watched:
        value = linear_cross_entropy(hidden, weight, targets, VOCAB)
        if gradients:
            value.backward()
    with LargestOutput() as plain:
        F.cross_entropy(hidden @ weight.t(), targets)
    assert plain.largest == n_rows * PADDED
    # Nothing but the gradient of `hidden` may be as large as that tensor.
    assert rows * PADDED <= watched.largest <= (n_rows * WIDTH if gradients else rows * PADDED)


def test_the_precision_of_other_products_stays_as_it_was():
    torch.set_float32_matmul_precision("highest")
    hidden, weight, targets = make_inputs()
    linear_cross_entropy(hidden.requires_grad_(), weight, targets, VOCAB)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError):
        token_losses(hidden, weight, targets + VOCAB + PADDED, VOCAB)
    assert torch.get_float32_matmul_precision() == "highest"
