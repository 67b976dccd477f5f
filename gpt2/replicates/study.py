"""Further models of the main line, with other seeds of weights and data order, measured in the same way.

One model is one draw: its pairs of similar heads and its costs of pruning differ from those of the next seed. A
statement about models therefore rests on the main model and on these.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gpt2.data.shards import TokenSet
from gpt2.heads.similarity import SAVED_SIMILARITIES, HeadsConfig
from gpt2.heads.study import study_heads
from gpt2.hellaswag.items import load_benchmark
from gpt2.hellaswag.scoring import score_model
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.pipeline.files import read_json, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import Config
from gpt2.pipeline.scratch import locked, scratch_folder, source_files
from gpt2.prune.remove import PruneConfig
from gpt2.prune.study import study_pruning
from gpt2.train.loop import TrainConfig, fit
from gpt2.train.results import run_figures, run_identity
from gpt2.train.setup import build_run
from gpt2.train.short_runs import Distinct, run_each

# The code that decides the figures of a model.
SOURCES = source_files("data", "model", "train", "hellaswag", "heads", "prune", "replicates")
# Metrics files of the main model. A figure of any model is named like train.val_loss.
MEASURED = ("train", "hellaswag", "heads", "prune")
# Figures of metrics/replicates.json.
SUMMARISED = (
    *("train.val_loss", "train.val_bits_per_byte", "train.hellaswag_acc_norm"),
    *("hellaswag.completion_acc", "hellaswag.completion_acc_norm"),
    *("hellaswag.harness_acc", "hellaswag.harness_acc_norm"),
    *("heads.redundant_pairs", "heads.max_similarity", "heads.uniform_heads_percent", "heads.mean_centred_similarity"),
    "heads.pairs_above_untrained_centred_threshold_percent",
    "heads.pairs_above_shuffled_centred_threshold_percent",
    "prune.attention_loss",
    *(
        f"prune.{criterion}perplexity_rise_percent_at_15"
        for criterion in (
            *("", "matched_random_sets_", "random_sets_", "taylor_", "taylor_iterative_", "magnitude_", "loss_"),
            *("redundancy_refit_", "taylor_refit_"),
        )
    ),
    *(f"prune.{column}max_pruned_percent_below_5" for column in ("", "redundancy_refit_", "taylor_", "taylor_refit_")),
    *("prune.pruned_percent", "prune.pruned_perplexity_rise_percent"),
)
Figures = dict[str, Any]
log = logging.getLogger(__name__)


class ReplicatesConfig(Config):
    """Section `replicates`."""

    # A further model for each: the seed of its initial weights and of its data order.
    seeds: Distinct[int]


@dataclass(frozen=True)
class MainLine:
    """What all models share: shape, training and measurements. `tokens` is the folder of the token sets."""

    shape: GPTConfig
    train: TrainConfig
    batch_tokens: int
    heads: HeadsConfig
    prune: PruneConfig
    tokens: Path

    def with_seed(self, seed: int) -> TrainConfig:
        """The training of a further model."""
        return self.train.model_copy(update={"seed": seed})


def measure_replicates(line: MainLine, seeds: Sequence[int], hardware: HardwareConfig) -> list[Figures]:
    """Train and measure a model for each seed; on CPUs several at a time, one thread each.

    Each model resumes by itself: its training from a checkpoint, and a finished model is not measured again as long as
    its scratch folder exists. Returns the figures of the models, named file.key as in MEASURED, and `seed`.
    """
    return run_each(measure_replicate, [(line, seed) for seed in seeds], hardware)


def measure_replicate(line: MainLine, seed: int, device: torch.device) -> Figures:
    """Train one model in this process, measure it and return its figures."""
    folder = scratch_of(line, seed)
    finished = folder / "figures.json"
    with locked(folder):
        if finished.exists():
            return read_json(finished)
        _log_as(f"seed {seed}")
        run = build_run(line.with_seed(seed), line.shape, line.batch_tokens, line.tokens, Dist(0, 0, 1, device))
        result = fit(run.model, run.config, run.order, run.evaluation, run.dist, folder)
        log.info("trained; comparing and pruning heads")
        benchmark = load_benchmark(line.tokens / "hellaswag.npz")
        heads = study_heads(run.model, run.val, line.heads)
        similarities = {name: heads.matrices[name] for name in SAVED_SIMILARITIES}
        pruning = study_pruning(run.model, line.prune, line.tokens, similarities, benchmark, line.batch_tokens)
        measured = {
            "train": run_figures(run, result),
            "hellaswag": score_model(run.model, benchmark, line.batch_tokens)[0],
            "heads": heads.figures,
            "prune": pruning.figures,
        }
        write_json(finished, figures := name_figures(measured, seed))
        return figures


def scratch_of(line: MainLine, seed: int) -> Path:
    """The folder of a model's resume state and, once it is measured, of its figures."""
    measured = {
        "batch_tokens": line.batch_tokens,
        "heads": line.heads.model_dump(mode="json"),
        "prune": line.prune.model_dump(mode="json"),
    }
    identity = run_identity(line.shape, line.with_seed(seed), TokenSet(line.tokens, "train"))
    return scratch_folder("replicates", {**identity, **measured}, SOURCES)


def _log_as(name: str) -> None:
    """Log the progress of one model under its name if this process is a worker, which has no other log."""
    form = f"%(asctime)s replicates: {name}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=parent_process() is not None)


def name_figures(measured: Mapping[str, Mapping[str, Any]], seed: int) -> Figures:
    """The seed of a model and its figures, given by the names of MEASURED."""
    named = {f"{stem}.{key}": value for stem, values in measured.items() for key, value in values.items()}
    return {"seed": seed, **named}


def tabulate_models(models: Sequence[Figures]) -> pd.DataFrame:
    """A row for each model, the main one first; a column for each figure that all have."""
    return pd.DataFrame(list(models)).dropna(axis="columns")


def summarise_models(table: pd.DataFrame) -> dict[str, float]:
    """Figures of metrics/replicates.json: the number of models, and mean and sample standard deviation of SUMMARISED.

    A name like train.val_loss becomes train_val_loss_mean and train_val_loss_sd; one model has no deviation.
    """
    figures: dict[str, float] = {"models": len(table)}
    for name in SUMMARISED:
        key = name.replace(".", "_")
        figures[f"{key}_mean"] = round(float(table[name].mean()), 6)
        if len(table) > 1:
            figures[f"{key}_sd"] = round(float(table[name].std()), 6)
    return figures
