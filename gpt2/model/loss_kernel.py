"""Losses of a chunk of logits and their gradient on a GPU, in two passes over each row (Triton).

The maximum and the sum of a row's exponentials are found in one pass (Milakov & Gimelshein 2018, algorithm 3). A row
then still lies in the cache, so that the second pass, which overwrites it with the gradient, reads little from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row at a time, and the warps that share them.
BLOCK, WARPS = 4096, 8


def losses_and_gradients_(logits: Tensor, targets: Tensor, vocab_size: int, scale: float | None = None) -> Tensor:
    """-log softmax(logits[:, :vocab_size])[target] of each row in nats, fp32, shape (n,).

    With `scale`, logits (n, V), whose rows are contiguous, become scale × the gradient of the row's loss, in their own
    precision, and zero from vocab_size on.
    """
    losses = torch.empty(len(logits), device=logits.device)
    arguments = (logits, targets, losses, logits.stride(0), vocab_size, logits.shape[1], scale or 0.0)
    _kernel[(len(logits),)](*arguments, WITH_GRADIENT=scale is not None, BLOCK=BLOCK, num_warps=WARPS)
    return losses


@triton.jit
def _kernel(
    logits, targets, losses, stride, vocab_size, width, scale, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    row, target = logits + number * stride, tl.load(targets + number)
    picked = tl.load(row + target).to(tl.float32)
    peak, total = -float("inf"), 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
        before, peak = peak, tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(before - peak) + tl.sum(tl.exp(x - peak), 0)
    tl.store(losses + number, tl.log(total) + peak - picked)
    if WITH_GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(row + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
            gradient = scale / total * tl.exp(x - peak)
            gradient = tl.where(column == target, gradient - scale, gradient)
            tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < width)
