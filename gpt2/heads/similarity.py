"""How alike the attention heads of a model are, over tokens of text.

The pattern of a head is softmax(q k' / sqrt(D)), for each sequence a lower triangle of T x T weights. Laid end to end
over all sequences, query and key positions it is one vector per head, and two heads are compared by the cosine of their
vectors. Causal masks and the first token, which many heads use as a resting place, make patterns alike by themselves;
so the same figures are taken without the first key, for an untrained model, and for the same tokens in random order.

Letters: B sequences, T tokens, C channels, D channels of a head, M heads of all layers together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError, atomic_path
from gpt2.pipeline.params import Config

# Room for one block of float64 vectors of all heads: near the caches of a CPU, enough work for a GPU.
BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**28}
# A block of patterns takes at most this part of the query positions: keys after its last one are never computed.
MOST_ROWS = 1 / 4
# Sums are split into so many: a GPU gives a product of few rows and a long sum to few of its processors.
PARTIAL_SUMS = {"cpu": 1, "cuda": 64}
PATTERNS = ("pattern", "pattern_nosink")
# What compare_heads measures on tokens, and with what compare_circuits reads from the weights all that is compared.
ACTIVITY = (*PATTERNS, "output", "written")
SAVED_SIMILARITIES = (*ACTIVITY, "qk", "ov")
# Models that have learned nothing, or see text without order: what they have alike is no finding.
NULLS = ("untrained", "shuffled")


class HeadsConfig(Config):
    """How heads are compared."""

    # Validation tokens, rounded down to whole sequences.
    n_tokens: PositiveInt
    # Sequences per forward pass; changes memory and time alone.
    batch_size: PositiveInt
    # Two heads of one layer whose patterns have a cosine above this are redundant.
    threshold: Annotated[float, Field(gt=0, lt=1)]
    # The share of a null model's pairs, in percent, that lies below the threshold calibrated on it.
    null_percentile: Annotated[float, Field(gt=0, lt=100)]
    # Of the weights of the untrained model and of the order of shuffled tokens.
    seed: NonNegativeInt


class Head(NamedTuple):
    """Position of a head, both counted from 0."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used


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


def attend(q: Tensor, k: Tensor) -> Tensor:
    """Patterns (..., Q, K) of the queries q (..., Q, D) over the keys k (..., K, D), of which the last belongs to the
    last query. In float64, because fp32 products may be set to run as TF32.
    """
    q, k = q.double(), k.double()
    n_queries, before = q.shape[-2], k.shape[-2] - q.shape[-2]
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    future = torch.ones(n_queries, n_queries, dtype=torch.bool, device=q.device).triu(1)
    scores[..., before:].masked_fill_(future, -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def compare_heads(model: GPT, idx: Tensor, batch_size: int, outputs: bool = True) -> dict[str, np.ndarray]:
    """Cosines between all heads of all layers over the token ids `idx` (N, T): the ACTIVITY, each (M, M) float64.

    pattern: of the patterns. pattern_nosink: of the patterns without the first key. output: of the weighted values, D
    numbers a token. written: of what the head adds to the residual stream (its output times its columns of c_proj), C
    numbers a token. Only `written` compares outputs in one basis: a rotation of a head's values that c_proj undoes
    leaves the model as it is, but changes `output`. A head whose vector is zero has cosine 0 to all others. Without
    `outputs` the PATTERNS alone.

    Sums are kept in float64, so the result does not depend on batch_size beyond rounding. No T x T map is ever held:
    memory, beside the model and its forward pass, is 16 L B T C bytes for what one batch computes (151 MB a sequence
    for GPT-2 124M at T = 1024), 24 L T C for one of its sequences, and about four blocks of BLOCK_BYTES, where a block
    is at least one query row of a sequence (1.2 MB).

    Raises UserError if the model computes NaN or infinity.
    """
    n_heads = len(list_heads(model.config))
    device = model.wte.weight.device
    names = ACTIVITY if outputs else PATTERNS
    grams = {name: torch.zeros(n_heads, n_heads, dtype=torch.float64, device=device) for name in names}
    for batch in idx.split(batch_size):
        with capture_heads(model) as captured:
            model.hidden(batch.to(device))
        for pattern in _pattern_blocks(captured.qkv):
            first_key = pattern[..., 0].clone()
            pattern[..., 0] = 0
            grams["pattern_nosink"] += _gram(pattern)
            grams["pattern"] += _gram(first_key)
        if outputs:
            for output, written in _output_blocks(model, captured.output):
                grams["output"] += _gram(output)
                grams["written"] += _gram(written)
    # Adding the first key to the rest loses nothing; taking it from the whole would cancel digits.
    grams["pattern"] += grams["pattern_nosink"]
    if not all(gram.isfinite().all() for gram in grams.values()):
        raise UserError("the model computes NaN or infinity in its attention; lower train.max_lr and run dvc repro")
    return {name: cosine(gram.cpu().numpy()) for name, gram in grams.items()}


def _pattern_blocks(qkv: list[Tensor]) -> Iterator[Tensor]:
    """Yield the patterns of all heads (M, Q, K), float64: of one sequence a few query positions at a time."""
    B, T = qkv[0].shape[:2]
    for sequence in range(B):
        q, k = (_join([layer[sequence, :, part] for layer in qkv]) for part in (0, 1))
        room = BLOCK_BYTES[q.device.type] // (8 * len(q) * T)
        n_rows = max(1, min(math.ceil(T * MOST_ROWS), room))
        for start in range(0, T, n_rows):
            stop = min(start + n_rows, T)
            yield attend(q[:, start:stop], k[:, :stop])


def _output_blocks(model: GPT, outputs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of all heads (M, n, D) and what they write (M, n, C), float64, of a few tokens at a time."""
    attns = [block.attn for block in model.h if block.attn.n_head]
    columns = torch.cat([attn.c_proj.weight.double().t().unflatten(0, (attn.n_head, -1)) for attn in attns])
    n_rows = max(1, BLOCK_BYTES[columns.device.type] // (8 * len(columns) * model.config.n_embd))
    for layers in zip(*(z.flatten(0, 1).split(n_rows) for z in outputs), strict=True):
        output = _join(layers)
        yield output, output @ columns


def _join(layers: Sequence[Tensor]) -> Tensor:
    """What the heads of each layer computed of n tokens, (n, H, D), as (M, n, D) float64."""
    return torch.cat([*layers], dim=1).transpose(0, 1).contiguous().double()


def _gram(vectors: Tensor) -> Tensor:
    """Products (M, M) of the float64 vectors (M, ...) with each other."""
    flat = vectors.flatten(1)
    parts = flat.unflatten(1, (math.gcd(flat.shape[1], PARTIAL_SUMS[flat.device.type]), -1)).transpose(0, 1)
    return (parts @ parts.mT).sum(0)


def cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines (M, M) from products (M, M): symmetric, within [-1, 1], and 0 for a vector of length 0."""
    square = np.diagonal(gram)
    lengths = np.sqrt(np.outer(square, square))
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
    return np.clip((cosines + cosines.T) / 2, -1, 1)


def save_similarities(path: Path, config: GPTConfig, matrices: Mapping[str, np.ndarray]) -> None:
    """Write the SAVED_SIMILARITIES of a model, the pattern of each of NULLS, and `layer`, `head` of each row (M,)."""
    layer, head = np.array(list_heads(config)).T
    saved = {name: matrices[name] for name in (*SAVED_SIMILARITIES, *(f"{null}_pattern" for null in NULLS))}
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, layer=layer, head=head, **saved)  # type: ignore[arg-type]  # no name is that of its flag


def load_similarities(path: Path, config: GPTConfig) -> dict[str, np.ndarray]:
    """The SAVED_SIMILARITIES, each (M, M), written by save_similarities.

    Raises UserError if the file is absent, damaged, or of a model with other heads.
    """
    try:
        with np.load(path) as saved:
            heads = list(map(tuple, np.stack([saved["layer"], saved["head"]], axis=1).tolist()))
            matrices = {name: saved[name] for name in SAVED_SIMILARITIES}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); run dvc repro head-similarity") from error
    if heads != list_heads(config):
        raise UserError(
            f"{path} compares {len(heads)} heads, the model has {len(list_heads(config))} or others; "
            "run dvc repro head-similarity"
        )
    return matrices
