"""Does similarity tell which heads can go? That and the importance of each head beside what removing it alone costs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from gpt2.frontier import Evaluator
from gpt2.heads import Head

DIGITS = 6
# Of the heads, for the interval of a correlation.
RESAMPLES, SEED = 2000, 0
# What may predict the rise of the loss: the highest cosine to another head of the layer, by the name of its matrix in
# data/heads.npz, and the importance.
MATRICES = {
    "similarity": "pattern",
    "nosink": "pattern_nosink",
    "output": "output",
    "written": "written",
    "qk": "qk",
    "ov": "ov",
}
PREDICTORS = (*MATRICES, "taylor")


class HeadCost(NamedTuple):
    """A head, and what removing it alone costs: a row of heads.csv."""

    layer: int
    head: int
    # Highest cosine with another head of the layer: of the attention patterns, with and without the first key, of what
    # the heads put out and of what they write, of the circuits W_QK and W_OV.
    similarity: float
    nosink: float
    output: float
    written: float
    qk: float
    ov: float
    # Score of criteria.score_taylor.
    taylor: float
    # Nats per token.
    loss_rise: float


def cost_each_head(
    evaluator: Evaluator, heads: Sequence[Head], similarities: Mapping[str, np.ndarray], taylor: Sequence[Tensor]
) -> list[HeadCost]:
    """Remove every head alone and measure the mean loss.

    similarities (M, M) each are what load_similarities returns, taylor the scores (H,) of each layer.
    """
    whole, costs = evaluator.losses([]).mean(), []
    for i, head in enumerate(heads):
        others = [j for j, other in enumerate(heads) if other.layer == head.layer and j != i]
        numbers = (
            *(max((similarities[name][i, j] for j in others), default=0.0) for name in MATRICES.values()),
            taylor[head.layer][head.index].item(),
            evaluator.losses([head]).mean() - whole,
        )
        costs.append(HeadCost(*head, *(round(float(number), DIGITS) for number in numbers)))
    return costs


def correlate(costs: Sequence[HeadCost]) -> dict[str, float]:
    """Spearman's rank correlation of each of PREDICTORS with the rise of the loss, and its 95 % interval.

    The interval is the percentile bootstrap over heads (Efron & Tibshirani 1993, chapter 13), with RESAMPLES draws.
    """
    table = pd.DataFrame(costs)
    drawn = np.random.default_rng(SEED).integers(0, len(table), (RESAMPLES, len(table)))
    figures = {}
    for name in PREDICTORS:
        predictor, rise = table[name].to_numpy(), table["loss_rise"].to_numpy()
        low, high = np.percentile(_rank_correlations(predictor[drawn], rise[drawn]), (2.5, 97.5))
        (whole,) = _rank_correlations(predictor[None], rise[None])
        for end, value in (("", whole), ("_low", low), ("_high", high)):
            figures[f"{name}_rank_correlation{end}"] = round(float(value), DIGITS)
    return figures


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of x (R, M) with that of y (R, M); 0 where one does not vary."""
    x, y = (pd.DataFrame(values).rank(axis=1).to_numpy() for values in (x, y))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    lengths = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), lengths, out=np.zeros(len(x)), where=lengths > 0)
