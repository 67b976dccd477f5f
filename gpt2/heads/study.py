"""The head similarity study of one model: its heads on text, next to null models."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.null_models import compare_with_nulls
from gpt2.heads.redundancy import DIGITS, list_pairs, summarise_layers, summarise_pairs
from gpt2.heads.similarity import HeadsConfig, list_heads
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
