"""Closed-form repair of a pruned model, without training.

mean: the mean of what the removed heads wrote is added to the bias of c_proj (as in FLAP, An et al. 2024).
refit: the remaining columns of c_proj and its bias also approximate what the removed heads wrote by a linear function
of the remaining heads' outputs (ridge regression on calibration tokens).
stepwise: a refit of one layer after the other, which also corrects the error of the layers before.
merge: the value and output circuit of a removed head is folded into its twin, the head of the layer with the most
similar pattern; exact for equal patterns, up to what D channels can carry.

Letters: B sequences, T tokens, C channels, H heads of a layer, D channels of a head, K = H D, M heads of all layers.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.heads.similarity import Head, capture_heads, list_heads
from gpt2.model.gpt import GPT, CausalSelfAttention
from gpt2.pipeline.files import UserError
from gpt2.prune.remove import remove_heads

Repair = Literal["none", "mean", "refit", "stepwise", "merge", "merge_refit"]


class Moments(NamedTuple):
    """Mean (K,) and covariance (K, K), float64, of K quantities over the calibration tokens."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Calibration:
    """Input of the repairs: tokens in windows (N, T + 1), `batch_size` of them per pass, and statistics of the model.

    similarity (M, M): cosines of the attention patterns; moments: the result of gather_moments; ridge: as in refit.
    """

    windows: Tensor
    batch_size: int
    ridge: float
    similarity: np.ndarray
    moments: list[Moments]


def gather_calibration(
    model: GPT, windows: Tensor, batch_size: int, ridge: float, similarity: np.ndarray
) -> Calibration:
    """Pass the calibration tokens through the model once. Raises UserError if it computes NaN or infinity."""
    return Calibration(windows, batch_size, ridge, similarity, gather_moments(model, windows, batch_size))


def remove_and_repair(model: GPT, order: Sequence[Head], repair: Repair, calibration: Calibration) -> GPT:
    """A repaired copy of the model without these heads; a merge folds them in the given order.

    Only stepwise and merge_refit pass the calibration tokens through the model again. An empty order changes nothing.
    """
    if repair == "none" or not order:
        return remove_heads(model, order)
    if repair in ("mean", "refit"):
        return refit(model, order, calibration.moments, None if repair == "mean" else calibration.ridge)
    if repair == "stepwise":
        changed = remove_heads(model, order)
    else:
        changed = merge(model, order, calibration.similarity, calibration.moments)
    if repair == "merge":
        return changed
    return refit_stepwise(model, changed, calibration.windows, calibration.batch_size, calibration.ridge)


@torch.no_grad()
def gather_moments(model: GPT, windows: Tensor, batch_size: int) -> list[Moments]:
    """Moments of the head outputs of each layer of a whole model over the calibration tokens, windows (N, T + 1).

    One pass serves all sets of heads. It takes 2 (K + 1)^2 additional float64 operations per token and layer, and
    8 L (K + 1)^2 bytes (57 MB for GPT-2 124M). Raises UserError if the model computes NaN or infinity.
    """
    sums = [_Sums(n_head * model.config.head_dim, model.wte.weight.device) for n_head in model.config.layer_heads]
    for batch in windows.split(batch_size):
        with capture_heads(model) as captured:
            model.hidden(batch[:, :-1].to(model.wte.weight.device))
        for total, outputs in zip(sums, captured.output, strict=True):
            total.add(outputs.flatten(2))
    return [total.moments() for total in sums]


@torch.no_grad()
def refit(model: GPT, removed: Collection[Head], moments: Sequence[Moments], ridge: float | None) -> GPT:
    """A copy of the model without these heads, each c_proj refitted to the attention output of the whole model.

    In a layer that loses heads it minimises, over changes X of the remaining weights and over the bias, the mean over
    the calibration tokens of |original output - output|^2, plus ridge * m * |X|^2, where m is the mean square of the
    remaining channels. ridge None (infinite) changes only the bias: the repair `mean`. moments: the whole model's, from
    gather_moments. A layer takes about K^3 / 3 + 2 K^2 C float64 operations.
    """
    pruned = remove_heads(model, removed)
    for layer, (whole, left) in enumerate(zip(model.h, pruned.h, strict=True)):
        heads = [head.index for head in removed if head.layer == layer]
        if not heads:
            continue
        is_gone = torch.zeros(whole.attn.n_head, whole.attn.head_dim, dtype=torch.bool)
        is_gone[heads] = True
        gone, kept = (mask.flatten().nonzero().flatten() for mask in (is_gone, ~is_gone))
        mean, covariance = moments[layer]
        # The output that the layer loses is linear in the removed channels.
        lost = whole.attn.c_proj.weight[:, gone].double().t()
        own = Moments(mean[kept], covariance[kept][:, kept])
        _correct(left.attn.c_proj, own, mean[gone] @ lost, covariance[kept][:, gone] @ lost, ridge)
    return pruned


@torch.no_grad()
def refit_stepwise(model: GPT, changed: GPT, windows: Tensor, batch_size: int, ridge: float) -> GPT:
    """A copy of `changed`, the model with fewer or other heads, with c_proj refitted layer after layer.

    As in `refit`, but each layer gets its input from the layers refitted before it, and its target is the residual
    stream of the model after the attention, so it also corrects the error of the layers before. This takes one pass of
    the model and two of `changed` over windows (N, T + 1), and 8 N T C + 8 (K + C + 1)^2 bytes. Raises UserError if one
    computes NaN or infinity.
    """
    device, C = model.wte.weight.device, model.config.n_embd
    refitted = copy.deepcopy(changed)
    tokens = [batch[:, :-1].to(device) for batch in windows.split(batch_size)]
    targets = [model.wte(idx) + model.wpe.weight[: idx.shape[1]] for idx in tokens]
    states = list(targets)
    for original, block in zip(model.h, refitted.h, strict=True):
        total = _Sums(block.attn.n_head * block.attn.head_dim + C, device)
        for i, (target, state) in enumerate(zip(targets, states, strict=True)):
            with _watch(original.attn) as aim, _watch(block.attn) as found:
                targets[i] = original(target)
                block(state)
            *outputs, written = found
            total.add(*outputs, block.alpha * (target - state) + aim[-1] - written)
        mean, covariance = total.moments()
        own = Moments(mean[:-C], covariance[:-C, :-C])
        _correct(block.attn.c_proj, own, mean[-C:], covariance[:-C, -C:], ridge)
        states = [block(state) for state in states]
    return refitted


def _correct(c_proj: nn.Linear, inputs: Moments, mean_error: Tensor, covariance: Tensor, ridge: float | None) -> None:
    """Add to c_proj the ridge regression of an error (mean (C,), covariance with the inputs (K, C)) on its inputs."""
    if ridge is None:
        c_proj.bias.copy_(c_proj.bias.double() + mean_error)
        return
    penalised = inputs.covariance.clone()
    if len(inputs.mean):
        # Not the variance, which is rounding error where channels are constant. All squares may be 0.
        squares = inputs.covariance.diagonal() + inputs.mean.square()
        penalised.diagonal().add_((ridge * squares.mean()).clamp(min=torch.finfo(torch.float64).tiny))
    change = torch.cholesky_solve(covariance, torch.linalg.cholesky(penalised))
    c_proj.weight.copy_(c_proj.weight.double() + change.t())
    c_proj.bias.copy_(c_proj.bias.double() + mean_error - inputs.mean @ change)


def pair_heads(order: Sequence[Head], similarity: np.ndarray, heads: Sequence[Head]) -> list[Head | None]:
    """The twin of each head of `order`: the most similar head left in its layer at its removal, None if none is left.

    similarity (M, M) has a row and a column for each of `heads`.
    """
    left, twins = set(heads), []
    for head in order:
        left.remove(head)
        row = similarity[heads.index(head)]
        alike = [(row[heads.index(other)], other) for other in sorted(left) if other.layer == head.layer]
        twins.append(max(alike, key=lambda pair: pair[0])[1] if alike else None)
    return twins


@torch.no_grad()
def merge(model: GPT, order: Sequence[Head], similarity: np.ndarray, moments: Sequence[Moments]) -> GPT:
    """A copy of the model without these heads, each folded into its twin, in the given order.

    A head adds z W_O to its layer's output, where z = A x W_V + b_V are its weighted values. With the twin's pattern A
    for both, (W_V, W_O) of both is one circuit of rank 2 D at most. The D directions are kept in which the heads'
    outputs vary most over the calibration tokens; the mean of the rest is added to the bias of c_proj. A twin that is
    removed later is folded with all that it contains. The last head of a layer leaves its mean output.

    similarity (M, M): cosines of the patterns; moments: the whole model's, from gather_moments. A merge takes about
    2 K^2 D + 4 C D^2 float64 operations and no matrix larger than K x K or 2 D x C.
    """
    merged = remove_heads(model, order)
    twins = pair_heads(order, similarity, list_heads(model.config))
    folds = [(head, None if twin is None else twin.index) for head, twin in zip(order, twins, strict=True)]
    for layer, (whole, left) in enumerate(zip(model.h, merged.h, strict=True)):
        here = [(head.index, twin) for head, twin in folds if head.layer == layer]
        if here:
            _fold(whole.attn, left.attn, here, moments[layer])
    return merged


def _fold(
    whole: CausalSelfAttention, left: CausalSelfAttention, folds: Sequence[tuple[int, int | None]], moments: Moments
) -> None:
    """Write into `left` the circuits of the heads of `whole` that remain after the folds, (head, twin) each."""
    D, K = whole.head_dim, whole.n_head * whole.head_dim
    # A head's values are those of all heads times its mix (K, D); it writes its outputs times its write (D, C).
    mixes = dict(enumerate(torch.eye(K, dtype=torch.float64, device=moments.mean.device).split(D, dim=1)))
    writes = dict(enumerate(whole.c_proj.weight.double().t().split(D)))
    bias = whole.c_proj.bias.double()
    for head, twin in folds:
        mix, write = mixes.pop(head), writes.pop(head)
        if twin is None:
            bias = bias + moments.mean @ mix @ write
            continue
        mix, write = torch.cat([mixes[twin], mix], 1), torch.cat([writes[twin], write])
        directions = _main_directions(mix.t() @ moments.covariance @ mix, write, D)
        mixes[twin], writes[twin] = mix @ (write @ directions.t()), directions
        bias = bias + moments.mean @ (mix @ write - mixes[twin] @ directions)
    left.c_proj.bias.copy_(bias)
    if not mixes:
        return
    mix = torch.cat(list(mixes.values()), 1)
    left.c_attn.weight[2 * left.n_head * D :] = mix.t() @ whole.c_attn.weight[2 * K :].double()
    left.c_attn.bias[2 * left.n_head * D :] = mix.t() @ whole.c_attn.bias[2 * K :].double()
    left.c_proj.weight.copy_(torch.cat(list(writes.values())).t())


def _main_directions(covariance: Tensor, write: Tensor, count: int) -> Tensor:
    """The `count` orthonormal directions (count, C) in which z @ write (n, C) varies most, for z of this covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=0).sqrt()[:, None] * vectors.t()
    return torch.linalg.svd(root @ write, full_matrices=False).Vh[:count]


@contextmanager
def _watch(attn: CausalSelfAttention) -> Iterator[list[Tensor]]:
    """Collect the head outputs (B, T, K) of a layer, none if it has no heads, and its attention output (B, T, C)."""
    watched: list[Tensor] = []
    hooks = (
        attn.c_proj.register_forward_pre_hook(lambda module, args: watched.append(args[0])),
        attn.register_forward_hook(lambda module, args, output: watched.append(output)),
    )
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


class _Sums:
    """Running sums of K quantities and of their products over tokens."""

    def __init__(self, size: int, device: torch.device):
        self._gram = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)

    def add(self, *parts: Tensor) -> None:
        """Add tokens, their quantities given in parts (B, T, ...)."""
        one = parts[0].new_ones(*parts[0].shape[:2], 1)
        rows = torch.cat([*parts, one], -1).flatten(0, 1).double()
        self._gram.addmm_(rows.t(), rows)

    def moments(self) -> Moments:
        """Raises UserError if a quantity was NaN or infinite."""
        if not self._gram.isfinite().all():
            raise UserError("the model computes NaN or infinity in its attention; lower train.max_lr and run dvc repro")
        mean = self._gram[-1, :-1] / self._gram[-1, -1]
        return Moments(mean, self._gram[:-1, :-1] / self._gram[-1, -1] - mean.outer(mean))
