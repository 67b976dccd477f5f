"""Cross-entropy of a linear classifier over a large vocabulary, without the matrix of all logits.

A step of 16k tokens over 50k ids has 3.3 GB of fp32 logits. Here they exist for a few hundred rows at a time: each
chunk is turned in place from logits into the gradient of the logits (on a GPU by loss_kernel) and multiplied out at
once, so the backward pass costs nothing more and the three products are all the arithmetic there is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt2.model import fp8

# Room for one chunk of logits. On a CPU small enough to stay near the caches, on a GPU large enough to fill it.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**31}
# Gradients of logits, softmax minus one-hot, are in [-1, 1]: with this factor e5m2 holds those from 2^-31 on.
FP8_GRADIENT_SCALE = 2.0**15


# Compiled for a GPU (torch 2.11), the loop over one reused buffer reads out of bounds.
@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, fp8: bool = False
) -> Tensor:
    """Mean of -log softmax(hidden @ weight.T)[target] in nats, a scalar; Returns NaN for an empty batch, like torch.

    hidden (N, D), weight (V, D) with V >= vocab_size, targets (N,) int64 below vocab_size. Rows of `weight` from
    vocab_size on are padding: they get probability zero and gradient zero. Under autocast the products have its
    precision, and on a GPU the logits too, as in other trainers; sums over a row are fp32. With `fp8` and gradients
    enabled the three products are those of fp8 numbers.
    """
    if torch.is_grad_enabled():
        if torch.is_autocast_enabled(hidden.device.type):
            # As autocast has it with the operands of any other product.
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        function = _Fp8LinearCrossEntropy if fp8 else _LinearCrossEntropy
        return function.apply(hidden, weight, targets, vocab_size)
    return token_losses(hidden, weight, targets, vocab_size).mean()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each row in nats, fp32, shape (N,). Arguments as above."""
    weight = weight.to(hidden.dtype)
    losses = torch.empty(len(hidden), device=hidden.device)
    with _large_products(hidden.device):
        for rows, logits in _logit_chunks(hidden, weight):
            losses[rows] = _losses_(logits, targets[rows], vocab_size)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        weight_used = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        with _large_products(hidden.device):
            for rows, logits in _logit_chunks(hidden, weight_used):
                losses[rows], grad_logits = _differentiate_(logits, targets[rows], vocab_size, len(hidden))
                grad_logits = grad_logits.to(hidden.dtype)
                grad_hidden[rows] = grad_logits @ weight_used
                if weight.dtype == hidden.dtype:
                    grad_weight.addmm_(grad_logits.t(), hidden[rows])
                else:
                    grad_weight += grad_logits.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None


class _Fp8LinearCrossEntropy(_LinearCrossEntropy):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        h, w = fp8.quantise(hidden), fp8.quantise(weight)
        h_columns, w_columns = h.columns_first(), w.columns_first()
        losses = torch.empty(len(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gradient_scale = torch.full_like(h.scale, 1 / (len(hidden) * FP8_GRADIENT_SCALE))
        for rows in _chunks(len(hidden), 2 * len(weight), hidden.device, fp8.MULTIPLE):
            logits = fp8.matmul(h.rows(rows), w.t(), fast=True)
            losses[rows], *gradients = _differentiate_in_fp8(logits, targets[rows], vocab_size)
            gradient, transposed = (fp8.Scaled(values, gradient_scale) for values in gradients)
            grad_hidden[rows] = fp8.matmul(gradient, w_columns, fast=False)
            grad_weight += fp8.matmul(transposed, h_columns.rows(rows), fast=False)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.mean()


@contextmanager
def _large_products(device: torch.device) -> Iterator[None]:
    """Hand the fp32 products of a CPU to oneDNN, whose AVX-512 kernels serve any vendor, where MKL's serve one.

    Only here: on the small tiles of attention the same setting costs several times what it gains. And not where there
    is AMX, which would compute these products in bfloat16.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _chunks(n: int, row_bytes: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of n rows whose logits fit into a chunk, of as many rows each but for rounding up to a `multiple`."""
    most = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes)
    # Even slices: a small rest would pay for a whole pass over the weights.
    even = -(-n // max(1, -(-n // most)))
    size = max(1, -(-even // multiple) * multiple)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of rows, logits of those rows in the precision of `hidden`), overwritten by the next chunk."""
    # One buffer for all chunks: fresh pages of this size cost more time than the passes over them.
    buffer: Tensor | None = None
    for rows in _chunks(len(hidden), hidden.element_size() * len(weight), hidden.device):
        n = rows.stop - rows.start
        buffer = hidden.new_empty(n, len(weight)) if buffer is None else buffer
        yield rows, torch.mm(hidden[rows], weight.t(), out=buffer[:n])


def _losses_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Losses (n,), fp32, of logits (n, V), which may be overwritten."""
    if logits.is_cuda:
        return _import_kernel()(logits, targets, vocab_size)
    return _exponentiate_(logits.float(), targets, vocab_size)[0]


def _differentiate_(logits: Tensor, targets: Tensor, vocab_size: int, n: int) -> tuple[Tensor, Tensor]:
    """Losses (n,), and what a mean over `n` losses changes by with the logits, (n, V), in place of these."""
    if logits.is_cuda:
        return _import_kernel()(logits, targets, vocab_size, 1 / n), logits
    losses, logits, total = _exponentiate_(logits.float(), targets, vocab_size)
    # d mean(loss) / d logits = (softmax - one-hot of the target) / n
    logits.mul_((1 / (n * total)).unsqueeze(1))
    logits[torch.arange(len(logits)), targets] -= 1 / n
    return losses, logits


def _differentiate_in_fp8(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (n,), and softmax minus one-hot times FP8_GRADIENT_SCALE in e5m2, (n, V) and its transpose (V, n)."""
    if logits.is_cuda:
        from gpt2.model.loss_kernel import losses_and_fp8_gradients

        return losses_and_fp8_gradients(logits, targets, vocab_size, FP8_GRADIENT_SCALE)
    losses, logits = _differentiate_(logits, targets, vocab_size, 1)
    gradient = (logits * FP8_GRADIENT_SCALE).to(fp8.E5M2)
    return losses, gradient, gradient.t().contiguous()


def _import_kernel() -> Callable:
    # Triton comes with torch for GPUs alone.
    from gpt2.model.loss_kernel import losses_and_gradients_

    return losses_and_gradients_


def _exponentiate_(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (n,), exp(logits - row maximum) in place of the logits (n, V), and the row sums of these (n,)."""
    logits[:, vocab_size:] = -torch.inf
    peak = logits.amax(1)
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    total = logits.sub_(peak.unsqueeze(1)).exp_().sum(1)
    return total.log() + peak - picked, logits, total
