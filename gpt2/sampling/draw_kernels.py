"""The draw of a token among the likeliest ones on a GPU, in two kernels (Triton), where torch takes thirty."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A larger top_k is left to torch, since all pairs of tokens are compared.
MAX_TOP_K = 64
# Ids for one program, and the warps of it.
IDS, WARPS = 2048, 16
# A kernel's numbers are fp32, in which a smaller one would be zero.
SMALLEST = 1e-30


def draw_top_k(logits: Tensor, uniforms: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """Token ids (B,) drawn from logits (B, V) by a number of `uniforms` (B,) each, as sampling.py defines it."""
    rows, vocab_size = logits.shape
    top_k, width = min(top_k, vocab_size), max(2, triton.next_power_of_2(top_k))
    parts = triton.cdiv(vocab_size, IDS)
    best = torch.empty(rows, parts, width, dtype=torch.int64, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    strides = logits.stride(0), logits.stride(1)
    _best_of_part[rows, parts](logits, best, *strides, vocab_size, IDS=IDS, WIDTH=width, num_warps=WARPS)
    candidates = triton.next_power_of_2(parts * width)
    _draw[(rows,)](
        best, uniforms, drawn, parts * width, top_k, max(top_p, SMALLEST), max(temperature, SMALLEST),
        CANDIDATES=candidates, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return drawn


@triton.jit
def _best_of_part(logits, best, row_stride, id_stride, vocab_size, IDS: tl.constexpr, WIDTH: tl.constexpr):
    """The `WIDTH` largest logits of a part of a row, each as one integer that sorts like it and ends with its id."""
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * IDS + tl.arange(0, IDS)
    x = tl.load(logits + row * row_stride + ids * id_stride, mask=ids < vocab_size, other=-float("inf"))
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    # Negative floats sort backwards.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    largest = tl.topk((bits << 32) | ids, WIDTH)
    tl.store(best + (row * tl.num_programs(1) + part) * WIDTH + tl.arange(0, WIDTH), largest)


@triton.jit
def _draw(
    best, uniforms, drawn, n, top_k, top_p, temperature, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row, i, rank = tl.program_id(0), tl.arange(0, CANDIDATES), tl.arange(0, WIDTH)
    largest = tl.topk(tl.load(best + row * n + i, mask=i < n, other=-(2**63)), WIDTH)
    ids, bits = largest & 0xFFFFFFFF, (largest >> 32).to(tl.int32)
    x = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    p = tl.where(rank < top_k, tl.exp((x - tl.max(x, 0)).to(tl.float64) / temperature), 0.0)
    # A token is dropped if those before it already have the mass.
    p = tl.where(tl.cumsum(p, 0) - p < top_p * tl.sum(p, 0), p, 0.0)
    # Up to each token, in the order of ids.
    mass = tl.sum(tl.where(ids[None, :] <= ids[:, None], p[None, :], 0.0), 1)
    enough = (p > 0) & (mass >= tl.max(mass, 0) * (1 - tl.load(uniforms + row)))
    tl.store(drawn + row, tl.min(tl.where(enough, ids, 2**62), 0))
