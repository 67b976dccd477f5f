"""Cosine similarity of the attention heads of a model, over tokens of text.

The pattern of a head is softmax(q k' / sqrt(D)), for each sequence a lower triangle of T x T weights. Flattened over
all sequences, query and key positions it is one vector per head, and two heads are compared by the cosine of their
vectors. Causal masks and the first token, which many heads use as an attention sink, make patterns similar by
themselves. The cosines are therefore also measured without the first key, and centred: the uniform causal pattern,
1/t for each of the t keys of query t, is subtracted from both patterns. An untrained model has nearly that pattern in
all heads, so that its raw cosines are near 1 and its centred ones near 0.

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

# Bytes of one block of float64 vectors of all heads: about the caches of a CPU, enough work for a GPU.
BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**28}
# A block of patterns has at most this share of the query positions: keys after its last query are never computed.
MOST_ROWS = 1 / 4
# Number of partial sums of a product: a GPU assigns a product of few rows and a long sum to few of its processors.
PARTIAL_SUMS = {"cpu": 1, "cuda": 64}
# Patterns without the first key are derived by subtraction. A squared length below this share of the uniform pattern's
# is rounding error, and counts as 0.
ROUNDING = 1e-10
PATTERNS = ("pattern", "pattern_nosink", "pattern_centred")
# What compare_heads measures on tokens; the circuits, which compare_circuits reads from the weights, complete it.
ACTIVITY = (*PATTERNS, "output", "written")
SAVED_SIMILARITIES = (*ACTIVITY, "qk", "ov")
# Null models: an untrained model, and the trained one on tokens in random order.
NULLS = ("untrained", "shuffled")


class HeadsConfig(Config):
    """How heads are compared."""

    # Validation tokens, rounded down to whole sequences.
    n_tokens: PositiveInt
    # Sequences per forward pass; affects memory and time only.
    batch_size: PositiveInt
    # Two heads of one layer whose patterns have a cosine above this are redundant.
    threshold: Annotated[float, Field(gt=0, lt=1)]
    # The threshold calibrated on a null model is this percentile of the cosines of its pairs.
    null_percentile: Annotated[float, Field(gt=0, lt=100)]
    # Seeds the weights of the untrained model and the order of the shuffled tokens.
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
    """Patterns (..., Q, K) of the queries q (..., Q, D) over the keys k (..., K, D).

    The last query and the last key have the same position. In float64, because fp32 products may be set to run as TF32.
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

    pattern: of the patterns. pattern_nosink: of the patterns without the first key. pattern_centred: of the patterns
    minus the uniform pattern. output: of the weighted values, D numbers a token. written: of what the head adds to the
    residual stream (its output times its columns of c_proj), C numbers a token. Only `written` compares outputs in one
    basis: a rotation of a head's values that c_proj undoes does not change the model, but changes `output`. A head
    whose vector is zero has cosine 0 to all others. Without `outputs` only the PATTERNS are measured.

    A further entry, `uniform` (M,), has the cosine of each pattern with the uniform pattern.

    Sums are kept in float64, so the result does not depend on batch_size beyond rounding. No T x T map is ever held.
    Memory, in addition to the model and its forward pass, is 16 L B T C bytes for what one batch computes (151 MB a
    sequence for GPT-2 124M at T = 1024), 24 L T C for one of its sequences, and about four blocks of BLOCK_BYTES, where
    a block is at least one query row of a sequence (1.2 MB).

    Raises UserError if the model computes NaN or infinity.
    """
    n_heads = len(list_heads(model.config))
    device = model.wte.weight.device
    names = ("first_key", "later_keys", "output", "written") if outputs else ("first_key", "later_keys")
    grams = {name: torch.zeros(n_heads, n_heads, dtype=torch.float64, device=device) for name in names}
    overlap = torch.zeros(n_heads, dtype=torch.float64, device=device)
    for batch in idx.split(batch_size):
        with capture_heads(model) as captured:
            model.hidden(batch.to(device))
        for pattern, uniform in _pattern_blocks(captured.qkv):
            centred = pattern.sub_(uniform)
            first_key = centred[..., 0].clone()
            centred[..., 0] = 0
            grams["later_keys"] += _gram(centred)
            grams["first_key"] += _gram(first_key)
            overlap += first_key @ uniform[:, 0]
        if outputs:
            for output, written in _output_blocks(model, captured.output):
                grams["output"] += _gram(output)
                grams["written"] += _gram(written)
    if not all(gram.isfinite().all() for gram in grams.values()):
        raise UserError("the model computes NaN or infinity in its attention; lower train.max_lr and run dvc repro")
    first, later, *others = (gram.cpu().numpy() for gram in grams.values())
    patterns = _compare_patterns(first, later, overlap.cpu().numpy(), idx.shape)
    return patterns | {name: cosine(gram) for name, gram in zip(names[2:], others, strict=True)}


def _compare_patterns(
    first_key: np.ndarray, later_keys: np.ndarray, overlap: np.ndarray, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The PATTERNS and `uniform` of compare_heads from inner products of centred patterns.

    first_key, later_keys (M, M): of their parts on the first key and on all others. overlap (M,): of their parts on the
    first key with that of the uniform pattern. shape: (N, T) of the tokens.

    The weights of a query sum to 1, so a centred pattern x is orthogonal to the uniform pattern u, and that of
    patterns is <x_i + u, x_j + u> = <x_i, x_j> + <u, u>; without the first key, <x, u> is minus the overlap. The other
    direction, centred products from raw ones, would cancel most digits of patterns that are almost uniform.
    """
    n, T = shape
    t = np.arange(1, T + 1)
    length, later_length = n * (1 / t).sum(), n * ((t - 1) / t**2).sum()
    centred = first_key + later_keys
    pattern = centred + length
    nosink = later_keys - overlap - overlap[:, None] + later_length
    return {
        "pattern": cosine(pattern),
        "pattern_nosink": cosine(nosink, ROUNDING * later_length),
        "pattern_centred": cosine(centred),
        "uniform": np.sqrt(length / np.diagonal(pattern)),
    }


def _pattern_blocks(qkv: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the patterns of all heads (M, Q, K) and the uniform pattern (Q, K), float64, of a few queries at a time."""
    B, T = qkv[0].shape[:2]
    # All scores are equal. The same arithmetic as the heads' makes the difference from a uniform head exactly 0.
    zeros = qkv[0].new_zeros(T, 1)
    for sequence in range(B):
        q, k = (_join([layer[sequence, :, part] for layer in qkv]) for part in (0, 1))
        room = BLOCK_BYTES[q.device.type] // (8 * len(q) * T)
        n_rows = max(1, min(math.ceil(T * MOST_ROWS), room))
        for start in range(0, T, n_rows):
            stop = min(start + n_rows, T)
            yield attend(q[:, start:stop], k[:, :stop]), attend(zeros[start:stop], zeros[:stop])


def _output_blocks(model: GPT, outputs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs (M, n, D) of all heads and what they write (M, n, C), float64, of a few tokens at a time."""
    attns = [block.attn for block in model.h if block.attn.n_head]
    columns = torch.cat([attn.c_proj.weight.double().t().unflatten(0, (attn.n_head, -1)) for attn in attns])
    n_rows = max(1, BLOCK_BYTES[columns.device.type] // (8 * len(columns) * model.config.n_embd))
    for layers in zip(*(z.flatten(0, 1).split(n_rows) for z in outputs), strict=True):
        output = _join(layers)
        yield output, output @ columns


def _join(layers: Sequence[Tensor]) -> Tensor:
    """Stack what the heads of each layer computed, (n, H, D) for n tokens, to (M, n, D) float64."""
    return torch.cat([*layers], dim=1).transpose(0, 1).contiguous().double()


def _gram(vectors: Tensor) -> Tensor:
    """Inner products (M, M) of the float64 vectors (M, ...)."""
    flat = vectors.flatten(1)
    parts = flat.unflatten(1, (math.gcd(flat.shape[1], PARTIAL_SUMS[flat.device.type]), -1)).transpose(0, 1)
    return (parts @ parts.mT).sum(0)


def cosine(gram: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Cosines (M, M) from inner products (M, M): symmetric, within [-1, 1].

    0 for a vector whose squared length is not above `least`.
    """
    square = np.diagonal(gram)
    square = np.where(square > least, square, 0)
    lengths = np.sqrt(np.outer(square, square))
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
    return np.clip((cosines + cosines.T) / 2, -1, 1)


def save_similarities(path: Path, config: GPTConfig, matrices: Mapping[str, np.ndarray]) -> None:
    """Write the SAVED_SIMILARITIES of a model, `pattern` of each null model, and `layer`, `head` of each row (M,)."""
    layer, head = np.array(list_heads(config)).T
    saved = {name: matrices[name] for name in (*SAVED_SIMILARITIES, *(f"{null}_pattern" for null in NULLS))}
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, layer=layer, head=head, **saved)  # type: ignore[arg-type]  # no name is that of its flag


def load_similarities(path: Path, config: GPTConfig) -> dict[str, np.ndarray]:
    """Load the SAVED_SIMILARITIES, each (M, M), that save_similarities wrote.

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
