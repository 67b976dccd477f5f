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
# Rows and columns of a tile of fp8 gradients, which is written in both layouts, and its warps.
TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 32, 128, 4


def losses_and_gradients_(logits: Tensor, targets: Tensor, vocab_size: int, scale: float | None = None) -> Tensor:
    """-log softmax(logits[:, :vocab_size])[target] of each row in nats, fp32, shape (n,).

    With `scale`, logits (n, V), whose rows are contiguous, become scale × the gradient of the row's loss, in their own
    precision, and zero from vocab_size on.
    """
    losses = torch.empty(len(logits), device=logits.device)
    arguments = (logits, targets, losses, logits.stride(0), vocab_size, logits.shape[1], scale or 0.0)
    _kernel[(len(logits),)](*arguments, WITH_GRADIENT=scale is not None, BLOCK=BLOCK, num_warps=WARPS)
    return losses


def losses_and_fp8_gradients(
    logits: Tensor, targets: Tensor, vocab_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses as above, and scale × their gradients with the logits in e5m2, (n, V) and transposed (V, n)."""
    n, width = logits.shape
    losses = losses_and_gradients_(logits, targets, vocab_size)
    gradient = torch.empty(n, width, dtype=torch.float8_e5m2, device=logits.device)
    transposed = torch.empty(width, n, dtype=torch.float8_e5m2, device=logits.device)
    _fp8_kernel[triton.cdiv(n, TILE_ROWS), triton.cdiv(width, TILE_COLUMNS)](
        logits, targets, losses, gradient, transposed, n, vocab_size, width, scale,
        ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=TILE_WARPS,
    )  # fmt: skip
    return losses, gradient, transposed


@triton.jit
def _fp8_kernel(
    logits, targets, losses, gradient, transposed, n, vocab_size, width, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    target = tl.load(targets + row, mask=row < n, other=0)
    picked = tl.load(logits + row * width + target, mask=row < n, other=0.0).to(tl.float32)
    # The loss is log(sum of exponentials) - logit of the target.
    log_total = tl.load(losses + row, mask=row < n, other=0.0) + picked
    inside = (row < n)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(logits + place, mask=inside & (column < vocab_size)[None, :], other=-float("inf")).to(tl.float32)
    value = tl.exp(x - log_total[:, None]) - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    value = (scale * value).to(tl.float8e5)
    tl.store(gradient + place, value, mask=inside)
    tl.store(transposed + column[:, None] * n + row[None, :], tl.trans(value), mask=tl.trans(inside))


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
