"""How alike the attention heads of a model are, over validation tokens.

The pattern of a head is softmax(q k' / sqrt(D)), for each sequence a lower triangle of T x T weights. Laid end to end
over all sequences, query and key positions it is one vector per head, and two heads are compared by the cosine of their
vectors. Causal masks and the first token, which many heads use as a resting place, make patterns alike by themselves;
so the same figures are taken without the first key and for an untrained model.

Letters: B sequences, T tokens, C channels, D channels of a head, M heads of all layers together.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from gpt2.files import UserError, atomic_path
from gpt2.model import GPT, GPTConfig
from gpt2.params import Config

# Room for one block of float64 vectors of all heads: near the caches of a CPU, enough work for a GPU.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**28}
MATRICES = ("pattern", "pattern_nosink", "output", "written")


class HeadsConfig(Config):
    """How heads are compared."""

    # Validation tokens, rounded down to whole sequences.
    n_tokens: PositiveInt
    # Sequences per forward pass; changes memory and time alone.
    batch_size: PositiveInt
    # Two heads of one layer whose patterns have a cosine above this are redundant.
    threshold: Annotated[float, Field(gt=0, lt=1)]
    # Of the weights of the untrained model.
    seed: NonNegativeInt


class Head(NamedTuple):
    """Position of a head, both counted from 0."""

    layer: int
    index: int


class Captured(NamedTuple):
    """What the layers that have heads computed in one forward pass, first layer first."""

    # Queries, keys and values, each (B, T, 3, H, D).
    qkv: list[Tensor]
    # Values weighted by the pattern, each (B, T, H, D).
    output: list[Tensor]


def list_heads(config: GPTConfig) -> list[Head]:
    """All heads in the order of the rows and columns of every matrix here."""
    return [Head(layer, index) for layer, n_head in enumerate(config.layer_heads) for index in range(n_head)]


@contextmanager
def capture_heads(model: GPT) -> Iterator[Captured]:
    """Collect what the heads compute in the forward passes of the block; the hooks are gone after it."""
    captured = Captured([], [])
    hooks = []
    for block in model.h:
        shape = (block.attn.n_head, block.attn.head_dim)

        def keep_qkv(module, args, output, shape=shape) -> None:
            captured.qkv.append(output.unflatten(-1, (3, *shape)))

        def keep_output(module, args, shape=shape) -> None:
            captured.output.append(args[0].unflatten(-1, shape))

        hooks.append(block.attn.c_attn.register_forward_hook(keep_qkv))
        hooks.append(block.attn.c_proj.register_forward_pre_hook(keep_output))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def attend(qkv: Tensor, rows: slice) -> Tensor:
    """Patterns of the query positions `rows` over the keys before rows.stop, (H, B, Q, K) float64.

    qkv (B, T, 3, H, D) is what c_attn computed. In float64, because fp32 products may be set to run as TF32.
    """
    q, k = qkv[:, rows, 0].double(), qkv[:, : rows.stop, 1].double()
    scores = torch.einsum("bqhd,bkhd->hbqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(rows.start + 1)
    return scores.masked_fill_(future, -torch.inf).softmax(-1)


@torch.no_grad()
def compare_heads(model: GPT, idx: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """Cosines between all heads of all layers over the token ids `idx` (N, T): the MATRICES, each (M, M) float64.

    pattern: of the patterns. pattern_nosink: of the patterns without the first key. output: of the weighted values, D
    numbers a token. written: of what the head adds to the residual stream (its output times its columns of c_proj), C
    numbers a token. Only `written` compares outputs in one basis: a rotation of a head's values that c_proj undoes
    leaves the model as it is, but changes `output`. A head whose vector is zero has cosine 0 to all others.

    Sums are kept in float64, so the result does not depend on batch_size beyond rounding. Memory beside the model:
    28 L B T C bytes for one batch (264 MB a sequence for GPT-2 124M at T = 1024) and about four blocks of BLOCK_BYTES,
    where a block is at least one query row of one batch (1.2 MB a sequence).

    Raises UserError if the model computes NaN or infinity.
    """
    n_heads = len(list_heads(model.config))
    device = model.wte.weight.device
    grams = {name: torch.zeros(n_heads, n_heads, dtype=torch.float64, device=device) for name in MATRICES}
    for batch in idx.split(batch_size):
        with capture_heads(model) as captured:
            model.hidden(batch.to(device))
        for pattern in _pattern_blocks(captured.qkv, n_heads):
            first_key = pattern[..., 0].clone()
            pattern[..., 0] = 0
            grams["pattern_nosink"] += _gram(pattern)
            grams["pattern"] += _gram(first_key)
        grams["output"] += _gram(torch.cat([z.permute(2, 0, 1, 3) for z in captured.output]).double())
        for written in _written_blocks(model, captured.output, n_heads):
            grams["written"] += _gram(written)
    # Adding the first key to the rest loses nothing; taking it from the whole would cancel digits.
    grams["pattern"] += grams["pattern_nosink"]
    if not all(gram.isfinite().all() for gram in grams.values()):
        raise UserError("the model computes NaN or infinity in its attention; lower train.max_lr and run dvc repro")
    return {name: cosine(gram.cpu().numpy()) for name, gram in grams.items()}


def _pattern_blocks(qkv: list[Tensor], n_heads: int) -> Iterator[Tensor]:
    """Yield the patterns of all heads (M, B, Q, K), float64, a few query positions at a time."""
    B, T = qkv[0].shape[:2]
    n_rows = max(1, BLOCK_BYTES[qkv[0].device.type] // (8 * n_heads * B * T))
    for start in range(0, T, n_rows):
        rows = slice(start, min(start + n_rows, T))
        yield torch.cat([attend(layer, rows) for layer in qkv])


def _written_blocks(model: GPT, outputs: list[Tensor], n_heads: int) -> Iterator[Tensor]:
    """Yield what all heads add to the residual stream (M, n, C), float64, for a few tokens at a time."""
    attns = [block.attn for block in model.h if block.attn.n_head]
    columns = [attn.c_proj.weight.double().unflatten(1, (attn.n_head, attn.head_dim)) for attn in attns]
    n_rows = max(1, BLOCK_BYTES[outputs[0].device.type] // (8 * n_heads * model.config.n_embd))
    for blocks in zip(*(z.flatten(0, 1).split(n_rows) for z in outputs), strict=True):
        yield torch.cat([torch.einsum("nhd,chd->hnc", z.double(), w) for z, w in zip(blocks, columns, strict=True)])


def _gram(vectors: Tensor) -> Tensor:
    """Products (M, M) of the float64 vectors (M, ...) with each other."""
    flat = vectors.flatten(1)
    return flat @ flat.t()


def cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines (M, M) from products (M, M): symmetric, within [-1, 1], and 0 for a vector of length 0."""
    square = np.diagonal(gram)
    lengths = np.sqrt(np.outer(square, square))
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
    return np.clip((cosines + cosines.T) / 2, -1, 1)


def save_similarities(
    path: Path, config: GPTConfig, trained: dict[str, np.ndarray], untrained_pattern: np.ndarray
) -> None:
    """Write the MATRICES of a model, the patterns' of an untrained one, and `layer` and `head` of each row (M,)."""
    layer, head = np.array(list_heads(config)).T
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, layer=layer, head=head, untrained_pattern=untrained_pattern, **trained)


def load_similarity(path: Path, config: GPTConfig) -> np.ndarray:
    """Cosines (M, M) of the patterns, written by save_similarities.

    Raises UserError if the file is absent, damaged, or of a model with other heads.
    """
    try:
        with np.load(path) as saved:
            heads = list(map(tuple, np.stack([saved["layer"], saved["head"]], axis=1).tolist()))
            pattern = saved["pattern"]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); run dvc repro head-similarity") from error
    if heads != list_heads(config):
        raise UserError(
            f"{path} compares {len(heads)} heads, the model has {len(list_heads(config))} or others; "
            "run dvc repro head-similarity"
        )
    return pattern


def load_similarities(path: Path, config: GPTConfig) -> dict[str, np.ndarray]:
    """Temporary: until head-similarity writes the circuits, `written` stands for them."""
    pattern = load_similarity(path, config)
    with np.load(path) as saved:
        found = {name: saved[name] for name in ("pattern_nosink", "output", "written", "qk", "ov") if name in saved}
    return {"pattern": pattern, "qk": found["written"], "ov": found["written"], **found}
