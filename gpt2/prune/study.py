"""The pruning study: which heads the trained model can lose, by criterion and repair, and the model that is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.similarity import list_heads
from gpt2.hellaswag.items import Benchmark
from gpt2.model.gpt import GPT
from gpt2.prune.criteria import rank_heads, score_taylor
from gpt2.prune.frontier import (
    COLUMNS,
    Column,
    Evaluator,
    choose_removed,
    measure_frontier,
    summarise_frontier,
    tabulate,
    tabulate_intervals,
)
from gpt2.prune.iterative import order_by_loss, order_by_taylor_again
from gpt2.prune.random_sets import compare_with_chance, measure_random_sets, tabulate_similarities
from gpt2.prune.recovery import recover, summarise_recovery
from gpt2.prune.remove import PruneConfig, claimed_count, count_removals, remove_heads
from gpt2.prune.repair import gather_calibration, remove_and_repair
from gpt2.prune.scores import score_models
from gpt2.prune.similarity_orders import rank_by_similarity
from gpt2.prune.single_heads import HeadCost, correlate_costs, cost_each_head

# Columns and rows of a CSV file.
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


@dataclass(frozen=True)
class Text:
    """Windows (N, T + 1) of three splits, so that no criterion and no repair is judged on tokens it has seen."""

    calibration: Tensor
    scoring: Tensor
    greedy: Tensor
    eval: Tensor


@dataclass(frozen=True)
class PruningStudy:
    """Results of the study: the pruned model, the models to time, and what the stage writes.

    tables: columns and rows of each CSV file, by its name without the suffix. timing_windows (B, T + 1): one batch.
    """

    pruned: GPT
    timed: dict[str, GPT]
    tables: dict[str, Table]
    figures: dict[str, Any]
    timing_windows: Tensor


def read_text(folder: Path, model: GPT, config: PruneConfig) -> Text:
    """Read the windows from the token sets in `folder`; the greedy search takes more of the split that scores."""
    train, val, test = (TokenSet(folder, split) for split in ("train", "val", "test"))
    return Text(
        *(
            spread_windows(tokens, model.config.block_size, count)
            for tokens, count in (
                (train, config.calibration_tokens),
                (val, config.scoring_tokens),
                (val, config.greedy_tokens),
                (test, config.eval_tokens),
            )
        )
    )


def study_pruning(
    model: GPT,
    config: PruneConfig,
    tokens: Path,
    similarities: Mapping[str, np.ndarray],
    benchmark: Benchmark,
    batch_tokens: int,
) -> PruningStudy:
    """Compare all criteria and repairs, then prune the largest set of heads under the limit, and train what is left.

    tokens: the folder of the token sets. similarities (M, M) each are what load_similarities returns.
    """
    counts, heads = count_removals(model, config.shares), list_heads(model.config)
    text = read_text(tokens, model, config)
    calibration = gather_calibration(model, text.calibration, config.batch_size, config.ridge, similarities["pattern"])
    evaluator = Evaluator(model, calibration, text.eval, config.batch_size)
    taylor = score_taylor(model, text.scoring, config.batch_size)

    costs = cost_each_head(evaluator, heads, similarities, taylor)
    orders = rank_heads(model, similarities["pattern"], taylor, config.random_seeds) | {
        "taylor_iterative": [order_by_taylor_again(model, taylor, text.scoring, counts, config.batch_size)],
        "loss": [order_by_loss(model, text.greedy, counts[-1], config.batch_size)],
    }
    frontier = measure_frontier(evaluator, orders, counts)
    chosen, removed = choose_removed(frontier, orders, config.limit_percent)
    steps = config.recovery_steps if removed else 0
    order = TrainOrder(TokenSet(tokens, "train"), model.config.block_size, config.batch_size, config.recovery_seed)
    pruned = recover(
        remove_and_repair(model, removed, chosen.repair, calibration), order, steps, config.recovery_max_lr
    )

    ranked = rank_by_similarity(model, similarities, taylor, calibration.moments)
    columns = [Column(name, "none") for name in ranked]
    similar = measure_frontier(evaluator, {name: [order] for name, order in ranked.items()}, counts, columns)
    claimed = claimed_count(len(heads))
    sets = measure_random_sets(evaluator, heads, claimed, config.random_sets)
    plain = [column.name for column in COLUMNS if column.repair == "none" and column.criterion != "random"]
    by_redundancy = {count: remove_heads(model, orders["redundancy"][0][:count]) for count in counts}
    scored = {"whole": model, "redundancy_at_15": by_redundancy[claimed], "pruned": pruned}
    figures = summarise_frontier(model, frontier, chosen, removed)
    figures |= {
        **{f"{use}_tokens": windows[:, 1:].numel() for use, windows in vars(text).items()},
        **summarise_recovery(figures, pruned, steps, text.eval, config.batch_size),
        **correlate_costs(costs),
        **compare_with_chance(frontier, similar, plain, claimed, sets),
        **score_models(scored, benchmark, batch_tokens),
    }
    return PruningStudy(
        pruned,
        {f"heads_removed_{count}": smaller for count, smaller in by_redundancy.items()} | {"pruned": pruned},
        {
            "heads": (HeadCost._fields, costs),
            "frontier": tabulate(model, frontier),
            "intervals": tabulate_intervals(frontier),
            "similarities": tabulate_similarities(frontier, similar),
        },
        figures,
        text.eval[: config.batch_size],
    )
