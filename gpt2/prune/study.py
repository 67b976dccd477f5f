"""The pruning study: cost of removing heads by criterion and repair, and the pruned model to save."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import group_windows, spread_windows
from gpt2.heads.similarity import list_heads
from gpt2.hellaswag.items import Benchmark
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.prune.bootstrap import draw_weights
from gpt2.prune.criteria import make_masks, mask_heads, rank_by_similarity, rank_heads, score_taylor
from gpt2.prune.frontier import (
    CHOICES,
    CLAIMED_RISE_PERCENT,
    COLUMNS,
    DIGITS,
    SIMILAR,
    Evaluator,
    choose_removed,
    measure_frontier,
    prefix_of,
    summarise_frontier,
    tabulate,
    tabulate_intervals,
)
from gpt2.prune.iterative import order_by_loss, order_by_taylor_again
from gpt2.prune.random_sets import compare_with_chance, draw_sets, tabulate_similarities
from gpt2.prune.recovery import recover
from gpt2.prune.remove import PruneConfig, claimed_count, count_removals, remove_heads
from gpt2.prune.repair import gather_calibration, remove_and_repair
from gpt2.prune.scores import score_models
from gpt2.prune.single_heads import HeadCost, correlate_costs, cost_each_head

# Columns and rows of a CSV file.
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


class Text(NamedTuple):
    """Disjoint windows (N, T + 1): of train for the repairs, of val for the criteria and for the choice of the saved
    model, of test for all that is reported."""

    calibration: Tensor
    scoring: Tensor
    selection: Tensor
    eval: Tensor


@dataclass(frozen=True)
class PruningStudy:
    """Results of the study: the pruned model, the models to time, and the content of the stage's files.

    tables: columns and rows of each CSV file, by its name without the suffix. timing_windows (B, T + 1): one batch.
    """

    pruned: GPT
    timed: dict[str, GPT]
    tables: dict[str, Table]
    figures: dict[str, Any]
    timing_windows: Tensor


def read_text(folder: Path, block_size: int, config: PruneConfig) -> Text:
    """Read the windows from the token sets in `folder`. Raises UserError if a split is too short."""
    train, val, test = (TokenSet(folder, split) for split in ("train", "val", "test"))
    n_scoring, n_selection = config.scoring_tokens // block_size, config.selection_tokens // block_size
    validation = spread_windows(val, block_size, (n_scoring + n_selection) * block_size)
    # Both kinds alternate, so that each is spread over the split.
    n = len(validation)
    is_scoring = np.diff((np.arange(n + 1) * n_scoring + n // 2) // n) == 1
    return Text(
        spread_windows(train, block_size, config.calibration_tokens),
        validation[is_scoring],
        validation[~is_scoring],
        spread_windows(test, block_size, config.eval_tokens),
    )


def loss_without_attention(model: GPT, windows: Tensor, batch_size: int) -> float:
    """Mean loss in nats on windows (N, T + 1) without all heads."""
    with mask_heads(model, make_masks(model, list_heads(model.config))):
        return mean_loss(model, windows, batch_size)


def study_pruning(
    model: GPT,
    config: PruneConfig,
    tokens: Path,
    similarities: Mapping[str, np.ndarray],
    benchmark: Benchmark,
    batch_tokens: int,
) -> PruningStudy:
    """Compare all criteria and repairs, then prune the largest set of heads under the limit, and train the result.

    tokens: the folder of the token sets; similarities (M, M) each: the result of load_similarities.
    """
    counts, heads = count_removals(model, config.shares), list_heads(model.config)
    claimed, batch_size = claimed_count(len(heads)), config.batch_size
    text = read_text(tokens, model.config.block_size, config)
    groups = group_windows(TokenSet(tokens, "test"), model.config.block_size, config.eval_tokens)
    weights = draw_weights(groups)
    calibration = gather_calibration(model, text.calibration, batch_size, config.ridge, similarities["pattern"])
    evaluator = Evaluator(model, calibration, text.eval, batch_size)
    taylor = score_taylor(model, text.scoring, batch_size)

    orders = {
        **rank_heads(model, similarities["pattern"], taylor, config.random_seeds),
        "taylor_iterative": [order_by_taylor_again(model, taylor, text.scoring, counts, batch_size)],
        "loss": [order_by_loss(model, taylor, text.scoring, counts[-1], batch_size)],
        **rank_by_similarity(similarities, heads),
    }
    frontier = measure_frontier(evaluator, orders, counts, (*COLUMNS, *SIMILAR))
    selecting = Evaluator(model, calibration, text.selection, batch_size)
    limit = min(config.limit_percent, CLAIMED_RISE_PERCENT)
    selection = measure_frontier(selecting, orders, counts, COLUMNS, limit)
    chosen, removed = choose_removed(selection, orders, config.limit_percent)
    steps = config.recovery_steps if removed else 0
    order = TrainOrder(TokenSet(tokens, "train"), model.config.block_size, batch_size, config.recovery_seed)
    repaired = remove_and_repair(model, removed, chosen.repair, calibration)
    pruned = recover(repaired, order, steps, config.recovery_max_lr)

    costs = cost_each_head(evaluator, heads, similarities, taylor)
    choices = {prefix_of(column.name): orders[column.criterion][0][:claimed] for column in CHOICES}
    without_attention = loss_without_attention(model, text.eval, batch_size)
    random_losses = np.stack([evaluator.losses(some) for some in draw_sets(heads, claimed, config.random_sets)])
    by_redundancy = {count: remove_heads(model, orders["redundancy"][0][:count]) for count in counts}
    scored = {"whole": model, "redundancy_at_15": by_redundancy[claimed], "pruned": pruned}
    figures = {
        **summarise_frontier(model, frontier, selection, chosen, removed, weights),
        **{f"{use}_tokens": windows[:, 1:].numel() for use, windows in text._asdict().items()},
        "eval_document_groups": int(groups.max()) + 1,
        "attention_loss": round(without_attention - evaluator.losses([]).mean().item(), DIGITS),
        "recovery_steps": steps,
        **correlate_costs(costs),
        **compare_with_chance(evaluator, heads, choices, config.random_sets),
        **score_models(scored, benchmark, batch_tokens),
    }
    if steps:
        perplexity = math.exp(mean_loss(pruned, text.eval, batch_size))
        figures |= {
            "pruned_perplexity_before_recovery": figures["pruned_perplexity"],
            "pruned_perplexity": round(perplexity, DIGITS),
            "pruned_perplexity_rise_percent": round(100 * (perplexity / figures["baseline_perplexity"] - 1), DIGITS),
        }
    return PruningStudy(
        pruned,
        {f"heads_removed_{count}": smaller for count, smaller in by_redundancy.items()} | {"pruned": pruned},
        {
            "heads": (HeadCost._fields, costs),
            "frontier": tabulate(model, frontier),
            "intervals": tabulate_intervals(frontier, weights),
            "similarities": tabulate_similarities(frontier, claimed, random_losses, weights),
        },
        figures,
        text.eval[:batch_size],
    )
