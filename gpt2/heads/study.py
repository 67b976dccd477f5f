"""The head similarity study of one model: its heads on text, compared with two null models.

An untrained model of the same shape has the causal mask and the first token, but has learned nothing. The trained model
on the same tokens in random order has all that it learned, but no text: what its heads still have in common is due to
positions and single tokens. Similarity that a null model also has is no evidence that heads learned the same. Compare
with a null model by centred patterns: the raw ones of an untrained model are all uniform, so that no model can exceed
their cosines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.circuits import compare_circuits
from gpt2.heads.redundancy import DIGITS, list_pairs, summarise_layers, summarise_pairs
from gpt2.heads.similarity import HeadsConfig, compare_heads, list_heads
from gpt2.model.config import GPTConfig
from gpt2.model.evaluate import require_fit
from gpt2.model.gpt import GPT


@dataclass(frozen=True)
class HeadStudy:
    """What the study measures of a model with M heads."""

    # Of compare_with_nulls: cosines between all heads, (M, M), and with the uniform pattern, (M,).
    matrices: dict[str, np.ndarray]
    # By name: `pairs` of heads of one layer, `layers`, and the `matrix` of the patterns, a row and a column for a head.
    tables: dict[str, pd.DataFrame]
    figures: dict[str, float]


def study_heads(model: GPT, tokens: TokenSet, config: HeadsConfig) -> HeadStudy:
    """Compare the heads of `model` on windows spread evenly over `tokens`.

    Raises UserError if the model has another vocabulary than the tokens, the split is too short, no layer has two
    heads, or the model computes NaN or infinity.
    """
    require_fit(model, tokens)
    idx = spread_windows(tokens, model.config.block_size, config.n_tokens)[:, :-1]
    matrices = compare_with_nulls(model, idx, config)
    tables, figures = summarise_heads(model.config, matrices, config)
    return HeadStudy(matrices, tables, {**figures, "tokens": idx.numel()})


def compare_with_nulls(model: GPT, idx: Tensor, config: HeadsConfig) -> dict[str, np.ndarray]:
    """Cosines between all heads over the token ids `idx` (N, T), each (M, M) float64.

    The SAVED_SIMILARITIES of the model under their own names, the PATTERNS of the null models with the prefixes
    untrained_ and shuffled_, and the circuits of the untrained model. `uniform` of all three is (M,): cosines with the
    uniform pattern. Raises UserError as compare_heads.
    """
    untrained = GPT(model.config, config.seed).to(model.wte.weight.device)
    shuffled = shuffle_tokens(idx, config.seed)
    matrices = compare_heads(model, idx, config.batch_size) | compare_circuits(model)
    nulls = {
        "untrained": compare_heads(untrained, idx, config.batch_size, outputs=False) | compare_circuits(untrained),
        "shuffled": compare_heads(model, shuffled, config.batch_size, outputs=False),
    }
    return matrices | {f"{null}_{name}": matrix for null, of in nulls.items() for name, matrix in of.items()}


def shuffle_tokens(idx: Tensor, seed: int) -> Tensor:
    """The token ids (N, T) with each row permuted at random and separately; the seed determines the permutations."""
    generator = torch.Generator().manual_seed(seed)
    return idx.gather(1, torch.rand(idx.shape, generator=generator, dtype=torch.float64).argsort(1))


def summarise_heads(
    shape: GPTConfig, matrices: Mapping[str, np.ndarray], config: HeadsConfig
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """The tables and figures of a HeadStudy, without `tokens`, from its matrices.

    uniform_heads_percent: share of the heads whose pattern has a cosine above config.threshold with the uniform one,
    which is nearly the pattern of heads before training. Raises UserError if no layer has two heads.
    """
    pairs = list_pairs(shape, matrices)
    rules = (config.threshold, config.null_percentile)
    names = [f"l{head.layer}h{head.index}" for head in list_heads(shape)]
    tables = {
        "pairs": pairs,
        "layers": summarise_layers(pairs, *rules),
        "matrix": pd.DataFrame(matrices["pattern"], pd.Index(names, name="head"), names).reset_index(),
    }
    figures = summarise_pairs(shape, pairs, *rules)
    for prefix in ("", "untrained_"):
        share = (matrices[f"{prefix}uniform"] > config.threshold).mean()
        figures[f"{prefix}uniform_heads_percent"] = round(100 * float(share), DIGITS)
    return {name: table.round(DIGITS) for name, table in tables.items()}, figures
