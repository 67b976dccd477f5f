"""What removing heads costs: perplexity by criterion and repair, with intervals, and the largest set under a limit."""

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
from gpt2.prune.criteria import Order
from gpt2.prune.remove import claimed_count
from gpt2.prune.repair import Calibration, Repair, remove_and_repair

# Rise of perplexity that the reference allows for CLAIMED_SHARE of the heads.
CLAIMED_RISE_PERCENT = 5.0
DIGITS = 6


class Column(NamedTuple):
    """A way to prune: which heads go, and how the others make up for them."""

    criterion: str
    repair: Repair

    @property
    def name(self) -> str:
        """The criterion, and behind it the repair if there is one."""
        return self.criterion if self.repair == "none" else f"{self.criterion}_{self.repair}"


# What is compared of criteria alone.
PLAIN = tuple(Column(criterion, "none") for criterion in ("redundancy", "taylor", "magnitude", "random", "loss"))
# Redundancy alone says which head is the twin of which. The repairs that pass all calibration tokens through the model
# for each set of heads are left to the criteria that the others are measured by.
COLUMNS = (
    *(Column(column.criterion, repair) for column in PLAIN for repair in ("none", "refit")),
    Column("taylor_iterative", "none"),
    *(Column(criterion, "stepwise") for criterion in ("redundancy", "taylor")),
    *(Column("redundancy", repair) for repair in ("merge", "merge_refit")),
)
STEPWISE = tuple(column for column in COLUMNS if column.repair in ("stepwise", "merge_refit"))
# Random orders stand for comparison and decide nothing.
SELECTABLE = tuple(column for column in COLUMNS if column.criterion != "random")


class Evaluator:
    """Mean losses of windows (N, T + 1), for sets of heads that are removed from a model and repaired.

    What several orders share is evaluated once: the whole model, and a set of heads with the same repair.
    """

    def __init__(self, model: GPT, calibration: Calibration, windows: Tensor, batch_size: int):
        self._model, self._calibration, self._windows, self._batch_size = model, calibration, windows, batch_size
        self._known: dict[tuple[Repair, frozenset[Head]], np.ndarray] = {}

    def losses(self, removed: Order, repair: Repair = "none") -> np.ndarray:
        """Mean loss of each window, (N,) float64."""
        # Merging depends on the order of a set too, but has only one.
        key = (repair if removed else "none", frozenset(removed))
        if key not in self._known:
            pruned = remove_and_repair(self._model, removed, repair, self._calibration)
            self._known[key] = window_losses(pruned, self._windows, self._batch_size).double().mean(1).numpy()
        return self._known[key]


@dataclass(frozen=True)
class Frontier:
    """Losses of the model with the first `counts[i]` heads of some orders removed.

    losses[name][i], (S, N), are the mean losses of each window for each of S orders, of which random has several.
    counts begin with 0.
    """

    counts: list[int]
    losses: dict[str, list[np.ndarray]]

    @cached_property
    def perplexity(self) -> dict[str, list[float]]:
        """perplexity[name][i]; of several orders the mean, then <name>_low and <name>_high, the lowest and highest."""
        columns = {}
        for name, rows in self.losses.items():
            samples = [np.exp(losses.mean(1)) for losses in rows]
            columns[name] = [float(values.mean()) for values in samples]
            if len(rows[0]) > 1:
                columns[f"{name}_low"] = [float(values.min()) for values in samples]
                columns[f"{name}_high"] = [float(values.max()) for values in samples]
        return columns

    def rise_percent(self, name: str, count: int) -> float:
        """Rise in percent of the whole model's perplexity, for any name that `perplexity` has."""
        values = self.perplexity[name]
        return 100 * (values[self.counts.index(count)] / values[0] - 1)

    def resample(self, name: str, count: int) -> np.ndarray:
        """The rise of `losses` in bootstrap draws, (R,), which pair with those of other names and counts."""
        whole, *_ = self.losses[name][0]
        return resample_rises(whole, self.losses[name][self.counts.index(count)])

    def most_removed(self, name: str, limit_percent: float) -> int:
        """The largest count whose rise is below the limit; 0 if none is."""
        return max(count for count in self.counts if count == 0 or self.rise_percent(name, count) < limit_percent)


def measure_frontier(
    evaluator: Evaluator,
    orders: Mapping[str, Sequence[Order]],
    counts: list[int],
    columns: Sequence[Column] = COLUMNS,
) -> Frontier:
    """Losses with the first n heads of every order removed, for n in `counts`, by `columns`."""
    return Frontier(
        counts,
        {
            column.name: [
                np.stack([evaluator.losses(order[:count], column.repair) for order in orders[column.criterion]])
                for count in counts
            ]
            for column in columns
        },
    )


def choose_removed(
    frontier: Frontier, orders: Mapping[str, Sequence[Order]], limit_percent: float
) -> tuple[Column, Order]:
    """Column and heads of the largest set whose rise of perplexity is below the limit; no heads if none is.

    Among equally large sets the one of lowest perplexity, of equals the first of SELECTABLE.
    """
    most = {column: frontier.most_removed(column.name, limit_percent) for column in SELECTABLE}
    best = min(SELECTABLE, key=lambda column: (-most[column], frontier.rise_percent(column.name, most[column])))
    return best, orders[best.criterion][0][: most[best]]


def tabulate(model: GPT, frontier: Frontier) -> tuple[list[str], list[list[float]]]:
    """Columns and rows of frontier.csv."""
    config, perplexity = model.config, frontier.perplexity
    n_heads = len(list_heads(config))
    rows = []
    for i, count in enumerate(frontier.counts):
        n_params, left = model.n_params() - count * params_per_head(config), n_heads - count
        rows.append(
            [
                count,
                round(100 * count / n_heads, DIGITS),
                *(round(values[i], DIGITS) for values in perplexity.values()),
                n_params,
                flops_per_token(config, left),
                kv_cache_bytes_per_token(left, config.head_dim),
                memory_bytes(config, n_params, left),
            ]
        )
    costs = ["params", "flops_per_token", "kv_cache_bytes_per_token", "memory_bytes"]
    return ["heads_removed", "heads_removed_percent", *perplexity, *costs], rows


def tabulate_intervals(frontier: Frontier) -> tuple[list[str], list[list]]:
    """Columns and rows of intervals.csv: the rise of perplexity by column and count, with its 95 % interval."""
    rows = [
        [name, count, *(round(value, DIGITS) for value in rise_with_interval(frontier, name, count))]
        for name in frontier.losses
        for count in frontier.counts[1:]
    ]
    return ["column", "heads_removed", "rise_percent", "low", "high"], rows


def summarise_frontier(model: GPT, frontier: Frontier, chosen: Column, removed: Order) -> dict[str, float]:
    """Figures of metrics/prune.json: each column of the frontier at 15 %, then the model saved without `removed`.

    <column>_perplexity_rise_percent_at_15_low and _high are the ends of the 95 % interval over windows; random_low_ and
    random_high_ stand before the figures of the best and the worst of the random orders. pruned_by_<column> is 1 for
    the one that chose the saved model, 0 for all if no head was removed.
    """
    n_heads, perplexity = len(list_heads(model.config)), frontier.perplexity
    claimed = claimed_count(n_heads)
    params_removed = {n: 100 * n * params_per_head(model.config) / model.n_params() for n in (claimed, len(removed))}
    figures = {
        "heads": n_heads,
        "baseline_perplexity": perplexity[chosen.name][0],
        "heads_removed_at_15": claimed,
        "params_removed_percent_at_15": params_removed[claimed],
        "pruned_heads": len(removed),
        "pruned_percent": 100 * len(removed) / n_heads,
        "pruned_params": model.n_params() - len(removed) * params_per_head(model.config),
        "pruned_params_percent": params_removed[len(removed)],
        "pruned_perplexity": perplexity[chosen.name][frontier.counts.index(len(removed))],
        "pruned_perplexity_rise_percent": frontier.rise_percent(chosen.name, len(removed)),
    }
    for name in perplexity:
        most = frontier.most_removed(name, CLAIMED_RISE_PERCENT)
        figures[f"{prefix_of(name)}perplexity_rise_percent_at_15"] = frontier.rise_percent(name, claimed)
        figures[f"{prefix_of(name)}max_pruned_percent_below_5"] = 100 * most / n_heads
    for name in frontier.losses:
        for end, value in zip(("low", "high"), interval(frontier.resample(name, claimed)), strict=True):
            figures[f"{prefix_of(name)}perplexity_rise_percent_at_15_{end}"] = value
    for column in SELECTABLE:
        figures[f"pruned_by_{column.name}"] = int(column == chosen and len(removed) > 0)
    return {key: round(value, DIGITS) for key, value in figures.items()}


def rise_with_interval(frontier: Frontier, name: str, count: int) -> tuple[float, float, float]:
    """Rise of perplexity in percent, and the ends of its 95 % interval over windows."""
    return frontier.rise_percent(name, count), *interval(frontier.resample(name, count))


def prefix_of(name: str) -> str:
    """Of the metrics of a column. The reference's way to prune, plain redundancy, has none."""
    return "" if name == "redundancy" else f"{name}_"
