"""Removal of attention heads: the pruned model is smaller, not masked."""

import copy
from collections.abc import Collection, Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT, CausalSelfAttention
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config

# Share of the heads that the reference removed; always evaluated.
CLAIMED_SHARE = 0.15


class PruneConfig(Config):
    """Shares of heads to remove, and tokens for criteria, repairs, selection and test."""

    # Shares of all heads to remove, each rounded to whole heads.
    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
    # One random order each.
    random_seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    # Random sets of CLAIMED_SHARE of the heads with which each choice is compared: free ones, and layer-matched ones.
    random_sets: PositiveInt
    # Training tokens for the repairs, validation tokens for Taylor's criterion and the greedy search, other validation
    # tokens for the choice of the saved model, test tokens for perplexity; each rounded down to whole sequences.
    calibration_tokens: PositiveInt
    scoring_tokens: PositiveInt
    selection_tokens: PositiveInt
    eval_tokens: PositiveInt
    # Ridge penalty of a refit, relative to the mean square of the channels it acts on; below this bound, rounding may
    # make the equations singular.
    ridge: Annotated[float, Field(ge=1e-9)]
    # Sequences per forward pass.
    batch_size: PositiveInt
    # The saved model has the most heads removed at a rise of perplexity below this.
    limit_percent: Annotated[float, Field(gt=0)]
    # Training steps of the saved model, of batch_size sequences each, and their highest learning rate.
    recovery_steps: NonNegativeInt
    recovery_max_lr: PositiveFloat
    # Of the order of the training data.
    recovery_seed: NonNegativeInt

    @model_validator(mode="after")
    def _distinct(self) -> "PruneConfig":
        for key in ("shares", "random_seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={list(values)} must not repeat a value; remove the second one")
        return self


def require_whole(model: GPT) -> None:
    """Raise UserError if heads were already removed from the model."""
    if model.config.heads is not None:
        raise UserError(
            f"the model is already pruned, heads={list(model.config.heads)}; start from the model that train wrote"
        )


def count_removals(model: GPT, shares: Sequence[float]) -> list[int]:
    """Ascending numbers of heads to remove: 0, CLAIMED_SHARE and `shares` of all heads, rounded.

    Raises UserError if the model is already pruned or a share rounds to no head or to all of them.
    """
    require_whole(model)
    n_heads = len(list_heads(model.config))
    for share in shares:
        if not 0 < round(share * n_heads) < n_heads:
            raise UserError(
                f"prune.shares contains {share}, which is {round(share * n_heads)} of {n_heads} heads; "
                f"choose values from {1 / n_heads:.3f} to {1 - 1 / n_heads:.3f}"
            )
    return sorted({0, claimed_count(n_heads), *(round(share * n_heads) for share in shares)})


def claimed_count(n_heads: int) -> int:
    """Number of heads in CLAIMED_SHARE of all."""
    return round(CLAIMED_SHARE * n_heads)


def remove_heads(model: GPT, removed: Collection[Head]) -> GPT:
    """A copy of the model without the rows of c_attn and columns of c_proj of these heads.

    Its output equals that of the model with the outputs of these heads set to zero. A layer without heads adds the bias
    of its c_proj. Raises UserError if the model is already pruned, lacks one of the heads, or would lose all.
    """
    require_whole(model)
    heads = list_heads(model.config)
    if foreign := sorted(set(removed) - set(heads)):
        raise UserError(f"removed={[tuple(head) for head in foreign]}: the model has no such (layer, head)")
    if len(set(removed)) == len(heads):
        raise UserError(f"removed={len(heads)} of {len(heads)} heads: a model must keep one; remove fewer")
    pruned = copy.deepcopy(model)
    if not removed:
        return pruned
    left = [head for head in heads if head not in removed]
    kept = [[head.index for head in left if head.layer == layer] for layer in range(model.config.n_layer)]
    pruned.config = GPTConfig(**{**model.config.model_dump(), "heads": tuple(map(len, kept))})
    for block, indices in zip(pruned.h, kept, strict=True):
        block.attn = _slice_attention(block.attn, pruned.config, indices)
    return pruned


@torch.no_grad()
def _slice_attention(attn: CausalSelfAttention, config: GPTConfig, kept: list[int]) -> CausalSelfAttention:
    small = CausalSelfAttention(config, len(kept)).to(attn.c_proj.weight).train(attn.training)
    heads = (attn.n_head, attn.head_dim)
    small.c_attn.weight.copy_(attn.c_attn.weight.unflatten(0, (3, *heads))[:, kept].flatten(0, 2))
    small.c_attn.bias.copy_(attn.c_attn.bias.unflatten(0, (3, *heads))[:, kept].flatten())
    small.c_proj.weight.copy_(attn.c_proj.weight.unflatten(1, heads)[:, kept].flatten(1))
    small.c_proj.bias.copy_(attn.c_proj.bias)
    return small
