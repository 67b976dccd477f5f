"""What removing heads costs and saves: perplexity by criterion and repair, parameters, operations, cache and time."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gpt2.criteria import CRITERIA, Order
from gpt2.evaluate import mean_loss, window_losses
from gpt2.heads import Head, list_heads
from gpt2.model import GPT, GPTConfig
from gpt2.prune import CLAIMED_SHARE
from gpt2.repair import Calibration, Repair, remove_and_repair

# Rise of perplexity that the reference allows for CLAIMED_SHARE of the heads.
CLAIMED_RISE_PERCENT = 5.0
DIGITS = 6
SPEED_ROUNDS = 5


class Column(NamedTuple):
    """A way to prune: which heads go, and how the others make up for them."""

    criterion: str
    repair: Repair

    @property
    def name(self) -> str:
        """The criterion, and behind it the repair if there is one."""
        return self.criterion if self.repair == "none" else f"{self.criterion}_{self.repair}"


# Redundancy alone says which head is the twin of which. The repairs that pass all calibration tokens through the model
# for each set of heads are left to the criteria that the others are measured by.
COLUMNS = (
    *(Column(criterion, repair) for criterion in CRITERIA for repair in ("none", "refit")),
    *(Column(criterion, "stepwise") for criterion in ("redundancy", "taylor")),
    *(Column("redundancy", repair) for repair in ("merge", "merge_refit")),
)
STEPWISE = tuple(column for column in COLUMNS if column.repair in ("stepwise", "merge_refit"))
# Random orders stand for comparison and decide nothing.
SELECTABLE = tuple(column for column in COLUMNS if column.criterion != "random")


@dataclass(frozen=True)
class Frontier:
    """Perplexity of the model with `counts[i]` heads removed: `perplexity[name][i]`.

    counts begin with 0. The names are those of COLUMNS; of random orders the mean over seeds, followed by <name>_low
    and <name>_high, the lowest and highest of them.
    """

    counts: list[int]
    perplexity: dict[str, list[float]]

    def rise_percent(self, name: str, count: int) -> float:
        """Rise of perplexity in percent of the whole model's."""
        values = self.perplexity[name]
        return 100 * (values[self.counts.index(count)] / values[0] - 1)

    def most_removed(self, name: str, limit_percent: float) -> int:
        """The largest count whose rise is below the limit; 0 if none is."""
        return max(count for count in self.counts if count == 0 or self.rise_percent(name, count) < limit_percent)


def measure_frontier(
    model: GPT,
    orders: Mapping[str, Sequence[Order]],
    counts: list[int],
    calibration: Calibration,
    windows: Tensor,
    batch_size: int,
) -> Frontier:
    """Perplexity on windows (N, T + 1) with the first n heads of every order removed, for n in `counts`, by COLUMNS.

    What several orders share is evaluated once: the whole model, and a set of heads with the same repair.
    """
    known: dict[tuple[Repair, frozenset[Head]], float] = {}

    def perplexity(removed: Order, repair: Repair) -> float:
        # Merging depends on the order of a set too, but has only one.
        key = (repair if removed else "none", frozenset(removed))
        if key not in known:
            pruned = remove_and_repair(model, removed, repair, calibration)
            known[key] = math.exp(mean_loss(pruned, windows, batch_size))
        return known[key]

    columns: dict[str, list[float]] = {}
    for column in COLUMNS:
        name, repair, ranked = column.name, column.repair, orders[column.criterion]
        samples = [[perplexity(order[:count], repair) for order in ranked] for count in counts]
        columns[name] = list(map(statistics.fmean, samples))
        if column.criterion == "random":
            columns |= {f"{name}_low": list(map(min, samples)), f"{name}_high": list(map(max, samples))}
    return Frontier(counts, columns)


def choose_removed(
    frontier: Frontier, orders: Mapping[str, Sequence[Order]], limit_percent: float
) -> tuple[Column, Order]:
    """Column and heads of the largest set whose rise of perplexity is below the limit; no heads if none is.

    Among equally large sets the one of lowest perplexity, of equals the first of SELECTABLE.
    """
    most = {column: frontier.most_removed(column.name, limit_percent) for column in SELECTABLE}
    best = min(SELECTABLE, key=lambda column: (-most[column], frontier.rise_percent(column.name, most[column])))
    return best, orders[best.criterion][0][: most[best]]


def params_per_head(config: GPTConfig) -> int:
    """Weights and biases of queries, keys and values, and the columns of c_proj."""
    return config.head_dim * (4 * config.n_embd + 3)


def flops_per_token(config: GPTConfig, n_heads: int) -> int:
    """Multiplications and additions of the forward pass for one token of a full sequence, with `n_heads` heads in all.

    Two for each weight of a product, the logits' included, and 4 D T for each head: q k' and the weighted sum of values
    over all T positions, as is usual (Chowdhery et al. 2022, appendix B). Norms, biases and GELU are left out.
    """
    C, D, T = config.n_embd, config.head_dim, config.block_size
    per_head = 2 * 4 * C * D + 4 * D * T
    return n_heads * per_head + config.n_layer * 2 * 8 * C * C + 2 * C * config.vocab_size


def kv_cache_bytes_per_token(n_heads: int, head_dim: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that generation keeps for each token; two bytes a value is bfloat16."""
    return 2 * n_heads * head_dim * bytes_per_value


def tabulate(model: GPT, frontier: Frontier) -> tuple[list[str], list[list[float]]]:
    """Columns and rows of frontier.csv."""
    config = model.config
    n_heads = len(list_heads(config))
    rows = [
        [
            count,
            round(100 * count / n_heads, DIGITS),
            *(round(values[i], DIGITS) for values in frontier.perplexity.values()),
            model.n_params() - count * params_per_head(config),
            flops_per_token(config, n_heads - count),
            kv_cache_bytes_per_token(n_heads - count, config.head_dim),
        ]
        for i, count in enumerate(frontier.counts)
    ]
    costs = ["params", "flops_per_token", "kv_cache_bytes_per_token"]
    return ["heads_removed", "heads_removed_percent", *frontier.perplexity, *costs], rows


def summarise(model: GPT, frontier: Frontier, chosen: Column, removed: Order) -> dict[str, float]:
    """Figures of metrics/prune.json: each column of the frontier at 15 %, then the model saved without `removed`.

    pruned_by_<column> is 1 for the one that chose the saved model, 0 for all if no head was removed.
    """
    n_heads = len(list_heads(model.config))
    claimed = round(CLAIMED_SHARE * n_heads)
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
    }
    for name in frontier.perplexity:
        # The reference's way to prune, plain redundancy, has no prefix.
        prefix = "" if name == "redundancy" else f"{name}_"
        most = frontier.most_removed(name, CLAIMED_RISE_PERCENT)
        figures[f"{prefix}perplexity_rise_percent_at_15"] = frontier.rise_percent(name, claimed)
        figures[f"{prefix}max_pruned_percent_below_5"] = 100 * most / n_heads
    for column in SELECTABLE:
        figures[f"pruned_by_{column.name}"] = int(column == chosen and len(removed) > 0)
    return {key: round(value, DIGITS) for key, value in figures.items()}


def compare_speed(models: Mapping[str, GPT], windows: Tensor) -> dict[str, float]:
    """Median tokens/s of a forward pass with logits and loss over windows (B, T + 1), for each of `models`.

    The models take turns, so that a machine that slows down slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + SPEED_ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            # Ends with the losses on the CPU, so a GPU has finished.
            window_losses(model, windows, len(windows))
            seconds[name].append(time.perf_counter() - started)
    n_tokens = len(windows) * (windows.shape[1] - 1)
    # The first round warms caches and kernels.
    return {name: round(n_tokens / statistics.median(times[1:]), 1) for name, times in seconds.items()}
