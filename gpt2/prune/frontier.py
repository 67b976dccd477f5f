"""Perplexity by criterion, repair and number of heads removed, with intervals, and the largest set under a limit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gpt2.heads.similarity import Head, list_heads
from gpt2.model.evaluate import window_losses
from gpt2.model.flops import flops_per_token, kv_cache_bytes_per_token, memory_bytes, params_per_head
from gpt2.model.gpt import GPT
from gpt2.prune.bootstrap import interval, resample_rises
from gpt2.prune.criteria import SIMILAR_ORDERS, SIMILARITY_PREFIX, Order
from gpt2.prune.remove import claimed_count
from gpt2.prune.repair import Calibration, Repair, remove_and_repair

# Rise of perplexity that the reference allows for CLAIMED_SHARE of the heads.
CLAIMED_RISE_PERCENT = 5.0
DIGITS = 6


class Column(NamedTuple):
    """A method of pruning: the criterion that chooses the heads, and the repair after their removal."""

    criterion: str
    repair: Repair

    @property
    def name(self) -> str:
        """The criterion, followed by the repair if there is one."""
        return self.criterion if self.repair == "none" else f"{self.criterion}_{self.repair}"


# The criteria that the benchmark times.
PLAIN = tuple(Column(criterion, "none") for criterion in ("redundancy", "taylor", "magnitude", "random", "loss"))
# Only redundancy pairs heads, which merging needs. The repairs that pass all calibration tokens through the model for
# each set of heads are limited to the two main criteria.
COLUMNS = (
    *(Column(column.criterion, repair) for column in PLAIN for repair in ("none", "refit")),
    Column("taylor_iterative", "none"),
    *(Column(criterion, repair) for repair in ("mean", "stepwise") for criterion in ("redundancy", "taylor")),
    *(Column("redundancy", repair) for repair in ("merge", "merge_refit")),
)
# Random orders are a baseline and never choose the saved model.
SELECTABLE = tuple(column for column in COLUMNS if column.criterion != "random")
# Other similarities in place of that of the patterns, measured but not selectable.
SIMILAR = tuple(Column(f"{SIMILARITY_PREFIX}{name}", "none") for name in SIMILAR_ORDERS)
# One choice of heads each, compared with random sets.
CHOICES = (*(column for column in SELECTABLE if column.repair == "none"), *SIMILAR)


class Evaluator:
    """Mean losses of windows (N, T + 1) for sets of heads that are removed from a model and repaired.

    Each set with the same repair is evaluated once, as is the whole model.
    """

    def __init__(self, model: GPT, calibration: Calibration, windows: Tensor, batch_size: int):
        self._model, self._calibration, self._windows, self._batch_size = model, calibration, windows, batch_size
        self._known: dict[tuple[Repair, frozenset[Head]], np.ndarray] = {}

    def losses(self, removed: Order, repair: Repair = "none") -> np.ndarray:
        """Mean loss of each window, (N,) float64."""
        # A merge depends on the order of a set too, but each set has only one.
        key = (repair if removed else "none", frozenset(removed))
        if key not in self._known:
            pruned = remove_and_repair(self._model, removed, repair, self._calibration)
            self._known[key] = window_losses(pruned, self._windows, self._batch_size).double().mean(1).numpy()
        return self._known[key]


@dataclass(frozen=True)
class Frontier:
    """Losses of the model with the first `counts[i]` heads of some orders removed; counts begin with 0.

    losses[name][i], (S, N): mean loss of each of N windows for each of S orders, NaN where it was not measured. Only
    random has several orders.
    """

    counts: list[int]
    losses: dict[str, list[np.ndarray]]

    @cached_property
    def perplexity(self) -> dict[str, list[float]]:
        """perplexity[name][i]; of several orders the mean, and the extremes as <name>_low and <name>_high."""
        columns = {}
        for name, rows in self.losses.items():
            samples = np.exp([losses.mean(1) for losses in rows])
            columns[name] = samples.mean(1).tolist()
            if samples.shape[1] > 1:
                columns |= {f"{name}_low": samples.min(1).tolist(), f"{name}_high": samples.max(1).tolist()}
        return columns

    def rise_percent(self, name: str, count: int) -> float:
        """Rise in percent of the whole model's perplexity, for any name of `perplexity`."""
        values = self.perplexity[name]
        return 100 * (values[self.counts.index(count)] / values[0] - 1)

    def most_removed(self, name: str, limit_percent: float) -> int:
        """The largest count whose rise is below the limit; 0 if none is."""
        return max(count for count in self.counts if count == 0 or self.rise_percent(name, count) < limit_percent)

    def resample(self, name: str, count: int, weights: np.ndarray) -> np.ndarray:
        """Rise of `losses` in each bootstrap draw, (R,), for the `weights` (R, N) of draw_weights."""
        whole, *_ = self.losses[name][0]
        return resample_rises(weights, whole, self.losses[name][self.counts.index(count)])

    def rise_with_interval(self, name: str, count: int, weights: np.ndarray) -> tuple[float, float, float]:
        """Rise of perplexity in percent, and the ends of its 95 % interval over documents."""
        return self.rise_percent(name, count), *interval(self.resample(name, count, weights))


def measure_frontier(
    evaluator: Evaluator,
    orders: Mapping[str, Sequence[Order]],
    counts: list[int],
    columns: Sequence[Column] = COLUMNS,
    limit_percent: float = -math.inf,
) -> Frontier:
    """Losses with the first n heads of every order removed, for n in the ascending `counts`, by `columns`.

    Each column is measured from the largest count down to the first at which the rises of all orders are below the
    limit: most_removed needs no other.
    """
    losses = {}
    for column in columns:
        ranked = orders[column.criterion]
        whole = np.stack([evaluator.losses([])] * len(ranked))
        rows = [whole] + [np.full_like(whole, np.nan) for _ in counts[1:]]
        for i in range(len(counts) - 1, 0, -1):
            rows[i] = np.stack([evaluator.losses(order[: counts[i]], column.repair) for order in ranked])
            if (100 * (np.exp(rows[i].mean(1)) / np.exp(whole.mean(1)) - 1) < limit_percent).all():
                break
        losses[column.name] = rows
    return Frontier(counts, losses)


def choose_removed(
    selection: Frontier, orders: Mapping[str, Sequence[Order]], limit_percent: float
) -> tuple[Column, Order]:
    """Column and heads of the largest set whose rise of perplexity is below the limit; no heads if none is.

    Ties go to the lowest perplexity, then to the first of SELECTABLE. `selection` is measured on windows of its own, so
    that the test windows judge a choice that they did not make (Cawley & Talbot 2010).
    """
    most = {column: selection.most_removed(column.name, limit_percent) for column in SELECTABLE}
    best = min(SELECTABLE, key=lambda column: (-most[column], selection.rise_percent(column.name, most[column])))
    return best, orders[best.criterion][0][: most[best]]


def tabulate(model: GPT, frontier: Frontier) -> tuple[list[str], list[list[float]]]:
    """Columns and rows of frontier.csv."""
    config, n_heads, rows = model.config, len(list_heads(model.config)), []
    for i, count in enumerate(frontier.counts):
        n_params, left = model.n_params() - count * params_per_head(config), n_heads - count
        rows.append(
            [
                count,
                round(100 * count / n_heads, DIGITS),
                *(round(values[i], DIGITS) for values in frontier.perplexity.values()),
                n_params,
                flops_per_token(config, left),
                kv_cache_bytes_per_token(left, config.head_dim),
                memory_bytes(config, n_params, left),
            ]
        )
    costs = ["params", "flops_per_token", "kv_cache_bytes_per_token", "memory_bytes"]
    return ["heads_removed", "heads_removed_percent", *frontier.perplexity, *costs], rows


def tabulate_intervals(frontier: Frontier, weights: np.ndarray) -> tuple[list[str], list[list]]:
    """Columns and rows of intervals.csv: the rise of perplexity by column and count, with its 95 % interval."""
    rows = [
        [name, count, *(round(value, DIGITS) for value in frontier.rise_with_interval(name, count, weights))]
        for name in frontier.losses
        for count in frontier.counts[1:]
    ]
    return ["column", "heads_removed", "rise_percent", "low", "high"], rows


def summarise_frontier(
    model: GPT, frontier: Frontier, selection: Frontier, chosen: Column, removed: Order, weights: np.ndarray
) -> dict[str, float]:
    """Figures of metrics/prune.json: each column at 15 % of the heads, and the saved model, without `removed`.

    Rises and perplexities are those of `frontier`, on test windows; <column>_max_pruned_percent_below_5 and
    pruned_selection_perplexity_rise_percent are those of `selection`. <column>_perplexity_rise_percent_at_15_low and
    _high are the ends of the 95 % interval over documents, of random for the mean of its orders; random_low_ and
    random_high_ are the best and the worst of the random orders. pruned_by_<column> is 1 for the column that chose the
    saved model, 0 for all if no head was removed.
    """
    n_heads = len(list_heads(model.config))
    claimed = claimed_count(n_heads)
    params_removed = {n: 100 * n * params_per_head(model.config) / model.n_params() for n in (claimed, len(removed))}
    figures = {
        "heads": n_heads,
        "baseline_perplexity": frontier.perplexity[chosen.name][0],
        "heads_removed_at_15": claimed,
        "params_removed_percent_at_15": params_removed[claimed],
        "pruned_heads": len(removed),
        "pruned_percent": 100 * len(removed) / n_heads,
        "pruned_params": model.n_params() - len(removed) * params_per_head(model.config),
        "pruned_params_percent": params_removed[len(removed)],
        "pruned_perplexity": frontier.perplexity[chosen.name][frontier.counts.index(len(removed))],
        "pruned_perplexity_rise_percent": frontier.rise_percent(chosen.name, len(removed)),
        "pruned_selection_perplexity_rise_percent": selection.rise_percent(chosen.name, len(removed)),
    }
    for name in frontier.perplexity:
        figures[f"{prefix_of(name)}perplexity_rise_percent_at_15"] = frontier.rise_percent(name, claimed)
    for name in selection.perplexity:
        most = selection.most_removed(name, CLAIMED_RISE_PERCENT)
        figures[f"{prefix_of(name)}max_pruned_percent_below_5"] = 100 * most / n_heads
    for name in frontier.losses:
        for end, value in zip(("low", "high"), interval(frontier.resample(name, claimed, weights)), strict=True):
            figures[f"{prefix_of(name)}perplexity_rise_percent_at_15_{end}"] = value
    figures |= {f"pruned_by_{column.name}": int(column == chosen and len(removed) > 0) for column in SELECTABLE}
    return {key: round(value, DIGITS) for key, value in figures.items()}


def prefix_of(name: str) -> str:
    """Prefix of the metrics of a column: none for plain redundancy, the reference's method."""
    return "" if name == "redundancy" else f"{name}_"
