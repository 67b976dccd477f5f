"""Does similarity tell which heads can go? That and the importance of each head beside what removing it alone costs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from gpt2.evaluate import mean_loss
from gpt2.heads import list_heads
from gpt2.model import GPT
from gpt2.prune import remove_heads

DIGITS = 6
# Of the heads, for the interval of a correlation.
RESAMPLES, SEED = 2000, 0
# What may predict the rise of the loss.
PREDICTORS = ("similarity", "taylor")


class HeadCost(NamedTuple):
    """A head, and what removing it alone costs: a row of heads.csv."""

    layer: int
    head: int
    # Highest cosine of its attention pattern with that of another head of the layer.
    similarity: float
    # Score of criteria.score_taylor.
    taylor: float
    # Nats per token.
    loss_rise: float


def cost_each_head(
    model: GPT, similarity: np.ndarray, taylor: Sequence[Tensor], windows: Tensor, batch_size: int
) -> list[HeadCost]:
    """Remove every head alone and measure the mean loss on windows (N, T + 1).

    similarity (M, M) are the cosines of the patterns, taylor the scores (H,) of each layer.
    """
    heads, whole = list_heads(model.config), mean_loss(model, windows, batch_size)
    costs = []
    for i, head in enumerate(heads):
        others = [similarity[i, j] for j, other in enumerate(heads) if other.layer == head.layer and i != j]
        numbers = (
            max(others, default=0.0),
            taylor[head.layer][head.index].item(),
            mean_loss(remove_heads(model, [head]), windows, batch_size) - whole,
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
