"""Does similarity tell which heads can go? That and the importance of each head beside what removing it alone costs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from gpt2.heads.similarity import Head
from gpt2.prune.frontier import Evaluator

DIGITS = 6
# Of the heads, for the interval of a correlation.
RESAMPLES, SEED = 2000, 0
# What may predict the rise of the loss: the highest cosine to another head of the layer, by the name of its matrix in
# data/heads.npz, and the importance.
COST_SIMILARITIES = {
    "similarity": "pattern",
    "nosink": "pattern_nosink",
    "output": "output",
    "written": "written",
    "qk": "qk",
    "ov": "ov",
}
COST_PREDICTORS = (*COST_SIMILARITIES, "taylor")


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
            *(max((similarities[name][i, j] for j in others), default=0.0) for name in COST_SIMILARITIES.values()),
            taylor[head.layer][head.index].item(),
            evaluator.losses([head]).mean() - whole,
        )
        costs.append(HeadCost(*head, *(round(float(number), DIGITS) for number in numbers)))
    return costs


def correlate_costs(costs: Sequence[HeadCost]) -> dict[str, float]:
    """Spearman's rank correlation of each of COST_PREDICTORS with the rise of the loss, and its 95 % interval.

    <predictor>_rank_correlation is that of all heads. Layers differ in both, and a predictor may tell no more than the
    layer; so in _rank_correlation_in_layer the mean of the layer is taken from the ranks. The interval is the
    percentile bootstrap over heads (Efron & Tibshirani 1993, chapter 13), with RESAMPLES draws.
    """
    table = pd.DataFrame(costs)
    drawn = np.random.default_rng(SEED).integers(0, len(table), (RESAMPLES, len(table)))
    # First all heads as they are.
    rows = np.vstack([np.arange(len(table)), drawn])
    layers, rise = table["layer"].to_numpy()[rows], _rank(table["loss_rise"].to_numpy()[rows])
    figures = {}
    for name in COST_PREDICTORS:
        predictor = _rank(table[name].to_numpy()[rows])
        for place, groups in (("", np.zeros_like(layers)), ("_in_layer", layers)):
            whole, *draws = _correlate(_centre(predictor, groups), _centre(rise, groups))
            low, high = np.percentile(draws, (2.5, 97.5))
            for end, value in (("", whole), ("_low", low), ("_high", high)):
                figures[f"{name}_rank_correlation{place}{end}"] = round(float(value), DIGITS)
    return figures


def _rank(values: np.ndarray) -> np.ndarray:
    """Rank in its row of each value (R, M), equal ones sharing the mean."""
    return pd.DataFrame(values).rank(axis=1).to_numpy()


def _centre(ranks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks (R, M) less the mean of their group (R, M) in the row."""
    centred = ranks.copy()
    for group in np.unique(groups):
        members = groups == group
        means = (ranks * members).sum(1) / np.maximum(1, members.sum(1))
        centred -= means[:, None] * members
    return centred


def _correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each row of x (R, M) with that of y (R, M), both centred; 0 where one does not vary."""
    lengths = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    # Rounding leaves some of what is taken from ranks that do not vary.
    return np.divide((x * y).sum(1), lengths, out=np.zeros(len(x)), where=lengths > 1e-6)
