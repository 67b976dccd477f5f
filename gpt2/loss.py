"""Cross-entropy of a linear classifier over a large vocabulary, without the matrix of all logits.

A step of 16k tokens over 50k ids has 3.3 GB of fp32 logits. Here they exist for a few hundred rows at a time: each
chunk is turned in place from logits into the gradient of the logits and multiplied out at once, so the backward pass
costs nothing more and the three products are all the arithmetic there is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Room for one chunk of logits. On a CPU small enough to stay near the caches, on a GPU large enough to fill it.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**31}


# Compiled for a GPU (torch 2.11), the loop over one reused buffer reads out of bounds.
@torch.compiler.disable
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean of -log softmax(hidden @ weight.T)[target] in nats, a scalar; NaN of no rows, as torch has it.

    hidden (N, D), weight (V, D) with V >= vocab_size, targets (N,) int64 below vocab_size. Rows of `weight` from
    vocab_size on are padding: they get probability zero and gradient zero.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size)
    return token_losses(hidden, weight, targets, vocab_size).mean()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each row in nats, fp32, shape (N,). Arguments as above."""
    weight = weight.to(hidden.dtype)
    losses = torch.empty(len(hidden), device=hidden.device)
    with _large_products(hidden.device):
        for rows, logits in _logit_chunks(hidden, weight, vocab_size):
            losses[rows] = _exponentiate_(logits, targets[rows])[0]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        n = len(hidden)
        weight_used = weight.to(hidden.dtype)
        losses = torch.empty(n, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        with _large_products(hidden.device):
            for rows, logits in _logit_chunks(hidden, weight_used, vocab_size):
                losses[rows], total = _exponentiate_(logits, targets[rows])
                # d mean(loss) / d logits = (softmax - one-hot of the target) / n
                logits.mul_((1 / (n * total)).unsqueeze(1))
                logits[torch.arange(len(logits), device=logits.device), targets[rows]] -= 1 / n
                grad_logits = logits.to(hidden.dtype)
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


@contextmanager
def _large_products(device: torch.device) -> Iterator[None]:
    """Hand the fp32 products of a CPU to oneDNN, whose AVX-512 kernels serve any vendor, where MKL's serve one.

    Only here: on the small tiles of attention the same setting costs several times what it gains.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _logit_chunks(hidden: Tensor, weight: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of rows, fp32 logits of those rows); the logits are overwritten by the next chunk."""
    if len(hidden) == 0:
        return
    most = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight)))
    # Even chunks: a small rest would pay for a whole pass over the weights.
    n_rows = -(-len(hidden) // -(-len(hidden) // most))
    # One buffer for all chunks: fresh pages of this size cost more time than the passes over them.
    buffer = hidden.new_empty(min(n_rows, len(hidden)), len(weight))
    for start in range(0, len(hidden), n_rows):
        rows = slice(start, min(start + n_rows, len(hidden)))
        logits = torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - start]).float()
        logits[:, vocab_size:] = -torch.inf
        yield rows, logits


def _exponentiate_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (n, V) in place into exp(logits - row maximum); return the losses (n,) and the row sums (n,)."""
    peak = logits.amax(1)
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    total = logits.sub_(peak.unsqueeze(1)).exp_().sum(1)
    return total.log() + peak - picked, total
