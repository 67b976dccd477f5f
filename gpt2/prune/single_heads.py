"""Cost of removing each head alone, and its rank correlation with the head's similarity and importance.

Letters: M heads, R draws or permutations.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import Tensor

from gpt2.heads.similarity import Head
from gpt2.prune.bootstrap import interval
from gpt2.prune.criteria import COST_SIMILARITIES
from gpt2.prune.frontier import Evaluator

DIGITS = 6
RESAMPLES, PERMUTATIONS, SEED = 2000, 9999, 0
# Predictors of the rise of the loss: the highest cosine with another head of the layer, and the importance.
COST_PREDICTORS = (*COST_SIMILARITIES, "taylor")


class HeadCost(NamedTuple):
    """A head and the cost of removing it alone: a row of heads.csv."""

    layer: int
    head: int
    # Highest cosine with another head of the layer: of the attention patterns, with and without the first key, of the
    # head outputs, of what the heads write to the residual stream, of the circuits W_QK and W_OV.
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

    similarities (M, M) each: the result of load_similarities; taylor: the scores (H,) of each layer.
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
    """Spearman's rank correlation of each of COST_PREDICTORS with the rise of the loss; costs are sorted by layer.

    <predictor>_rank_correlation: over all heads. _rank_correlation_in_layer: with the mean of the layer subtracted from
    the ranks, since layers differ in both quantities. _low and _high: percentile bootstrap over heads (Efron &
    Tibshirani 1993, chapter 13). _p: one-sided permutation test, over all heads or within layers, in the expected
    direction (negative for a similarity, positive for Taylor), corrected over all predictors and both kinds by Holm's
    method.
    """
    table, rng = pd.DataFrame(costs), np.random.default_rng(SEED)
    n, layers = len(table), table["layer"].to_numpy()
    # The first row is the heads themselves.
    rows = np.vstack([np.arange(n), rng.integers(0, n, (RESAMPLES, n))])
    figures: dict[str, float] = {}
    p_values: dict[str, float] = {}
    for place, groups in (("", np.zeros_like(layers)), ("_in_layer", layers)):
        rise = _centred_ranks(table["loss_rise"].to_numpy()[rows], groups[rows])
        # Sorting random fractions on top of the group permutes the heads of each group.
        permuted = rise[0][np.argsort(groups + rng.random((PERMUTATIONS, n)))]
        for name in COST_PREDICTORS:
            predictor, sign = _centred_ranks(table[name].to_numpy()[rows], groups[rows]), 1 if name == "taylor" else -1
            whole, *draws = _correlate(predictor, rise)
            as_extreme = (sign * _correlate(predictor[:1], permuted) >= sign * whole - 1e-9).sum()
            key = f"{name}_rank_correlation{place}"
            figures |= dict(zip((key, f"{key}_low", f"{key}_high"), (whole, *interval(np.array(draws))), strict=True))
            p_values[f"{key}_p"] = (1 + as_extreme) / (1 + PERMUTATIONS)
    figures |= dict(zip(p_values, holm(np.array(list(p_values.values()))), strict=True))
    return {key: round(float(value), DIGITS) for key, value in figures.items()}


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted for multiple tests (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)]


def _centred_ranks(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks of the values (R, M) in their row less the mean of their group (R, M)."""
    ranks = rankdata(values, axis=1)
    centred = ranks.copy()
    for group in np.unique(groups):
        members = groups == group
        centred -= members * ((ranks * members).sum(1) / np.maximum(1, members.sum(1)))[:, None]
    return centred


def _correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each row of x (R, M) or (1, M) with that of y (R, M), both centred; 0 where one is constant."""
    lengths = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    # Centring leaves rounding errors in constant ranks.
    return np.divide((x * y).sum(1), lengths, out=np.zeros(len(y)), where=lengths > 1e-6)
