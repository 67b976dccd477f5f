"""A token of each of a few texts through a block, on a GPU (Triton).

Such a step reads every weight once and computes next to nothing, so that its time goes to starting kernels and to
waiting for memory. Here a layer is five kernels: the products include the norms before them, and the GELU and the
residual sums after them. From compute capability 9.0 on a kernel starts while the one before it ends, and reads its
weights before it waits for it (programmatic dependent launch, CUDA programming guide).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpt2.model.gpt import GPT, Block

# Rows that a product takes one after another while its weights stay in registers.
MAX_ROWS = 8
# Columns of a product for each program, and the weights of each for one warp.
COLUMNS, WARP_WEIGHTS = 2, 1024
# Keys at a time, while the next ones are on their way, and the warps that share them.
KEYS, KEY_WARPS = 128, 16


def step(model: GPT, layers: list[tuple[Tensor, Tensor]], idx: Tensor, position: Tensor) -> Tensor:
    """Hidden states (rows, C) of the tokens idx (rows, 1) at `position` (1,), given keys and values of each layer.

    The kernels read the position on the GPU, so that one recording serves all lengths.
    """
    attends = [partial(attend_cache, keys=keys, values=values, position=position) for keys, values in layers]
    if len(idx) > MAX_ROWS:
        return model.hidden(idx, position, attends)[:, -1]
    x = model.wte(idx[:, 0]) + model.wpe(position)
    for block, attend in zip(model.h, attends, strict=True):
        x = _fused(block, x, attend)
    return model.ln_f(x)


def _fused(block: Block, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Block.forward for one token of each row, x (rows, C), with norms and sums inside the products."""
    attn, mlp = block.attn, block.mlp
    ln_1, ln_2 = (block.ln_1, block.ln_2) if block.pre_norm else (None, None)
    if attn.n_head:
        qkv = linear(x, attn.c_attn, norm=ln_1).view(len(x), 3, attn.n_head, 1, attn.head_dim)
        x = linear(attend(*qkv.unbind(1)).reshape(len(x), -1), attn.c_proj, residual=x, alpha=block.alpha)
    else:
        x = block.alpha * x + attn.c_proj.bias
    x = x if block.pre_norm else block.ln_1(x)
    x = linear(linear(x, mlp.c_fc, norm=ln_2, gelu=True), mlp.c_proj, residual=x, alpha=block.alpha)
    return x if block.pre_norm else block.ln_2(x)


def linear(
    x: Tensor,
    module: nn.Linear,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """gelu(module(norm(x))) + alpha × residual for x (rows, K) of at most MAX_ROWS rows, (rows, N)."""
    (rows, n_in), n_out = x.shape, module.out_features
    out, width = x.new_empty(rows, n_out), triton.next_power_of_2(n_in)
    _linear[(triton.cdiv(n_out, COLUMNS),)](
        x, module.weight, module.bias, norm and norm.weight, norm and norm.bias, residual, out,
        norm.eps if norm else 0.0, alpha, ROWS=rows, TILE=triton.next_power_of_2(rows), K=n_in, N=n_out,
        COLUMNS=COLUMNS, WIDTH=width, GELU=gelu, num_warps=max(1, width // WARP_WEIGHTS), **_overlap(x.device),
    )  # fmt: skip
    return out


def attend_cache(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Store k and v of a token (rows, H, 1, D) at `position` (1,); attention of q to the keys up to there.

    keys and values (at least rows, H, block_size, D); returns (rows, H, 1, D), laid out as (rows, 1, H, D).
    """
    rows, n_head, _, head_dim = q.shape
    out = q.new_empty(rows, 1, n_head, head_dim)
    _attend[(rows, n_head)](
        q, k, v, keys, values, position, out, q.stride(0), q.stride(1), keys.stride(1), 1 / math.sqrt(head_dim),
        H=n_head, D=head_dim, WIDTH=triton.next_power_of_2(head_dim), KEYS=KEYS,
        num_warps=KEY_WARPS, **_overlap(q.device),
    )  # fmt: skip
    return out.transpose(1, 2)


def _overlap(device: torch.device) -> dict[str, bool]:
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}


@triton.jit
def _linear(
    x, weight, bias, norm_weight, norm_bias, residual, out, eps, alpha, ROWS: tl.constexpr, TILE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr,
    OVERLAP: tl.constexpr
):  # fmt: skip
    row, n, k = tl.arange(0, TILE), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    there = k < K
    w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & there[None, :], other=0.0)
    b = tl.load(bias + n, mask=n < N)
    if norm_weight is not None:
        # w (gain c / s + shift) + b = (w gain) c / s + (w shift + b), for centred c of deviation s.
        gain, shift = tl.load(norm_weight + k, mask=there, other=0.0), tl.load(norm_bias + k, mask=there, other=0.0)
        b += tl.sum(w * shift[None, :], 1)
        w *= gain[None, :]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.zeros([TILE, COLUMNS], w.dtype)
    for i in tl.static_range(ROWS):
        h, scale = tl.load(x + i * K + k, mask=there, other=0.0), 1.0
        if norm_weight is not None:
            h = tl.where(there, h - tl.sum(h, 0) / K, 0.0)
            scale = tl.rsqrt(tl.sum(h * h, 0) / K + eps)
        # Kept until all are done: a store would hold back the loads of the next row.
        y = tl.where(row[:, None] == i, (tl.sum(w * h[None, :], 1) * scale)[None, :], y)
    y += b[None, :]
    if GELU:
        # GPT-2's tanh form, with 1 + tanh(u) = 2 / (1 + exp(-2u)) and 2 sqrt(2 / pi) = 1.5957691216057308.
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    place, mask = row[:, None] * N + n[None, :], (row < ROWS)[:, None] & (n < N)[None, :]
    if residual is not None:
        y += alpha * tl.load(residual + place, mask=mask)
    tl.store(out + place, y, mask=mask)


@triton.jit
def _attend(
    q, k, v, keys, values, position, out, row_stride, head_stride, cache_stride, scale, H: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    d, lane = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    keys += (row * H + head) * cache_stride
    values += (row * H + head) * cache_stride
    place, there = lane[:, None] * D + d[None, :], (d < D)[None, :]
    # Neither the position nor the old keys are of the kernel before.
    end = tl.load(position)
    seen = (lane < end)[:, None] & there
    k_old, v_old = tl.load(keys + place, mask=seen, other=0.0), tl.load(values + place, mask=seen, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    new = row * row_stride + head * head_stride + d
    q_new = tl.load(q + new, mask=d < D, other=0.0) * scale
    k_new, v_new = tl.load(k + new, mask=d < D, other=0.0), tl.load(v + new, mask=d < D, other=0.0)
    # Each lane has a softmax of its own over every KEYS-th key (Milakov & Gimelshein 2018), so that lanes wait for each
    # other but once; the first one begins with the new key.
    first = lane == 0
    peak = tl.where(first, tl.sum(q_new * k_new, 0), -1e30)
    total = tl.where(first, 1.0, 0.0).to(peak.dtype)
    y = tl.where(first[:, None], v_new[None, :], 0.0)
    for start in range(0, end, KEYS):
        score = tl.where(start + lane < end, tl.sum(q_new[None, :] * k_old, 1), -float("inf"))
        before, peak = peak, tl.maximum(peak, score)
        shrink, weight = tl.exp(before - peak), tl.exp(score - peak)
        total = total * shrink + weight
        y = y * shrink[:, None] + weight[:, None] * v_old
        place += KEYS * D
        seen = (start + KEYS + lane < end)[:, None] & there
        k_old, v_old = tl.load(keys + place, mask=seen, other=0.0), tl.load(values + place, mask=seen, other=0.0)
    share = tl.exp(peak - tl.max(peak, 0))
    y = tl.sum(y * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + (row * H + head) * D + d, y, mask=d < D)
    tl.store(keys + end * D + d, k_new, mask=d < D)
    tl.store(values + end * D + d, v_new, mask=d < D)
