"""Pre-LN, Post-LN and DeepNorm trained side by side: norm × learning rate × warm-up × seed on a small, deep model."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.model.config import GPTConfig, ModelShape, Norm
from gpt2.model.dist import Precision
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.train.optim import AdamConfig, OptimConfig
from gpt2.train.short_runs import order_windows, run_each, train_windows
from gpt2.train.stability import count_spikes, has_stalled

SETTING_COLUMNS = ("norm", "max_lr", "warmup_steps")
FAULT_COLUMNS = ("loss_spikes", "diverged", "diverged_at_step", "stalled", "max_grad_norm")
NORM_RUN_COLUMNS = (*SETTING_COLUMNS, "seed", "val_loss", *FAULT_COLUMNS)
NORM_TABLE_COLUMNS = (*SETTING_COLUMNS, "seeds", "val_loss", "val_loss_low", "val_loss_high", *FAULT_COLUMNS)
CURVE_COLUMNS = (*SETTING_COLUMNS, "seed", "step", "loss", "grad_norm")

# JSON has no infinity: figures there stop at so many nats, and at this L2 norm of all gradients. What is more, or not a
# number, is of a run that diverged, and is written in full to the CSV files.
LOSS_CAP, GRAD_NORM_CAP = 1e4, 1e9


class NormStudyConfig(ModelShape, AdamConfig):
    """Section `norm_study`: its own, small model and optimizer.

    The first learning rate and warm-up are the reference setting of the headline figures.
    """

    norms: tuple[Norm, ...] = Field(min_length=1)
    max_lrs: tuple[PositiveFloat, ...] = Field(min_length=1)
    warmup_steps: tuple[NonNegativeInt, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    max_steps: PositiveInt
    # The final learning rate as a fraction of the largest.
    min_lr_fraction: float = Field(ge=0, le=1)
    # Windows of one step, and at most of one forward pass.
    batch_windows: PositiveInt
    micro_batch: PositiveInt
    precision: Precision
    # Tokens taken from the training and from the validation split, in windows spread evenly over it.
    train_tokens: PositiveInt
    eval_tokens: PositiveInt
    # The most frequent tokens of the training slice keep an id of their own; all others share the last one.
    vocab_size: int = Field(ge=2)

    @model_validator(mode="after")
    def _fits(self) -> "NormStudyConfig":
        if max(self.warmup_steps) >= self.max_steps:
            raise ValueError(f"warmup_steps={list(self.warmup_steps)} must be less than max_steps={self.max_steps}")
        if self.train_tokens < self.batch_windows * self.block_size:
            raise ValueError(
                f"train_tokens={self.train_tokens} must fill one batch of batch_windows × block_size = "
                f"{self.batch_windows * self.block_size}; raise it"
            )
        for name in ("norms", "max_lrs", "warmup_steps", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must not name a value twice; remove one")
        return self


@dataclass(frozen=True)
class NormSetting:
    """One run of the study."""

    norm: Norm
    max_lr: float
    warmup_steps: int
    seed: int


@dataclass(frozen=True)
class StudyData:
    """Windows (N, T + 1) of ids below vocab_size, and the loss in nats of guessing by the training slice's frequencies.

    On the training slice that loss is the unigram entropy; a run that learned no more ends at unigram_val_loss.
    """

    train: torch.Tensor
    val: torch.Tensor
    vocab_size: int
    unigram_entropy: float
    unigram_val_loss: float


@dataclass(frozen=True)
class RunResult:
    """Loss and gradient norm of every step before a divergence; the largest gradient norm, that of the diverging step
    included; and the validation loss of the last weights.

    The last two may be infinite or not a number if the run diverged. It did so at step max_steps, counted from 0, if
    the validation was the first to see it.
    """

    setting: NormSetting
    losses: list[float]
    grad_norms: list[float]
    max_grad_norm: float
    val_loss: float
    diverged_at_step: int


def load_study_data(config: NormStudyConfig, train: TokenSet, val: TokenSet) -> StudyData:
    """Cut the slices and number their tokens by frequency.

    The rare ones share an id: a short run learns nothing about them, and they would double its time in the classifier.
    Raises UserError if a split is too short.
    """
    train_windows = spread_windows(train, config.block_size, config.train_tokens)
    val_windows = spread_windows(val, config.block_size, config.eval_tokens)
    counts = np.bincount(train_windows[:, 1:].flatten(), minlength=train.vocabulary.vocab_size)
    ranks = np.argsort(np.argsort(-counts, kind="stable"))
    ids = torch.from_numpy(np.minimum(ranks, config.vocab_size - 1))
    train_windows, val_windows = ids[train_windows], ids[val_windows]
    return StudyData(train_windows, val_windows, config.vocab_size, *unigram_losses(train_windows, val_windows))


def unigram_losses(train: torch.Tensor, val: torch.Tensor) -> tuple[float, float]:
    """Mean loss in nats of guessing each target by its share of the targets of `train`: on `train` and on `val`.

    Both are windows (N, T + 1). An id that `train` lacks counts as seen once.
    """
    n_ids = int(max(train.max(), val.max())) + 1
    seen, asked = (np.bincount(windows[:, 1:].flatten(), minlength=n_ids) for windows in (train, val))
    losses = -np.log(np.maximum(seen, 1) / seen.sum())
    return float(losses @ seen / seen.sum()), float(losses @ asked / asked.sum())


def run_study(config: NormStudyConfig, data: StudyData, hardware: HardwareConfig) -> list[RunResult]:
    """All runs of the study in the order norm, learning rate, warm-up, seed; on CPUs several at a time."""
    settings = [
        NormSetting(*values)
        for values in itertools.product(config.norms, config.max_lrs, config.warmup_steps, config.seeds)
    ]
    return run_each(train_norm_run, [(setting, config, data) for setting in settings], hardware)


def train_norm_run(setting: NormSetting, config: NormStudyConfig, data: StudyData, device: torch.device) -> RunResult:
    """Train one model from its seed; stops where it diverges."""
    values = config.model_dump()
    shape = GPTConfig(
        **{key: values[key] for key in ModelShape.model_fields}, vocab_size=data.vocab_size, norm=setting.norm
    )
    schedule = OptimConfig(
        **{key: values[key] for key in AdamConfig.model_fields},
        max_steps=config.max_steps,
        max_lr=setting.max_lr,
        min_lr=setting.max_lr * config.min_lr_fraction,
        warmup_steps=setting.warmup_steps,
    )
    model = GPT(shape, setting.seed).to(device)
    order = order_windows(len(data.train), config.max_steps, config.batch_windows, setting.seed)
    curve = train_windows(model, schedule, data.train, order, config.micro_batch, config.precision)
    diverged_at_step = curve.diverged_at_step
    val_loss = mean_loss(model, data.val, config.micro_batch, config.precision)
    if diverged_at_step < 0 and not math.isfinite(val_loss):
        diverged_at_step = config.max_steps
    return RunResult(setting, curve.losses, curve.grad_norms, curve.max_grad_norm, val_loss, diverged_at_step)


def run_rows(results: Sequence[RunResult], data: StudyData) -> list[tuple]:
    """One row a run, as in NORM_RUN_COLUMNS. A run that diverged has not stalled as well: it broke off."""
    rows = []
    for r in results:
        diverged = r.diverged_at_step >= 0
        stalled = not diverged and has_stalled(r.val_loss, data.unigram_val_loss)
        faults = (count_spikes(r.losses), int(diverged), r.diverged_at_step, int(stalled), r.max_grad_norm)
        rows.append((*_place(r), r.setting.seed, r.val_loss, *faults))
    return rows


def norm_table_rows(results: Sequence[RunResult], data: StudyData) -> list[tuple]:
    """One row for each norm, learning rate and warm-up, as in NORM_TABLE_COLUMNS.

    The validation loss is the mean over seeds, between the lowest and the highest; spikes, `diverged` and `stalled` are
    summed; the step is that of the earliest divergence, the gradient norm the largest. What is not a number counts as
    infinite.
    """
    rows = []
    for setting, runs in itertools.groupby(run_rows(results, data), key=lambda row: row[: len(SETTING_COLUMNS)]):
        columns = dict(zip(NORM_RUN_COLUMNS, zip(*runs, strict=True), strict=True))
        losses, grad_norms = (
            [math.inf if math.isnan(value) else value for value in columns[name]]
            for name in ("val_loss", "max_grad_norm")
        )
        row = {
            "seeds": len(losses),
            "val_loss": sum(losses) / len(losses),
            "val_loss_low": min(losses),
            "val_loss_high": max(losses),
            "loss_spikes": sum(columns["loss_spikes"]),
            "diverged": sum(columns["diverged"]),
            "diverged_at_step": min((step for step in columns["diverged_at_step"] if step >= 0), default=-1),
            "stalled": sum(columns["stalled"]),
            "max_grad_norm": max(grad_norms),
        }
        rows.append((*setting, *row.values()))
    return rows


def curve_rows(results: Sequence[RunResult]) -> list[tuple]:
    """One row a step of each run, as in CURVE_COLUMNS."""
    return [
        (*_place(r), r.setting.seed, step + 1, loss, grad_norm)
        for r in results
        for step, (loss, grad_norm) in enumerate(zip(r.losses, r.grad_norms, strict=True))
    ]


def wide_rows(results: Sequence[RunResult], config: NormStudyConfig, quantity: str) -> list[list]:
    """Rows of step and `quantity` ("losses" or "grad_norms") of each norm at the reference setting with the first seed;
    empty after divergence."""
    reference = (config.max_lrs[0], config.warmup_steps[0], config.seeds[0])
    runs = {NormSetting(norm, *reference): norm for norm in config.norms}
    curves = [getattr(r, quantity) for r in results if r.setting in runs]
    return [[step + 1, *values] for step, values in enumerate(itertools.zip_longest(*curves, fillvalue=""))]


def study_figures(results: Sequence[RunResult], config: NormStudyConfig, data: StudyData) -> dict[str, float]:
    """Figures of metrics/norm_study.json, up to LOSS_CAP and GRAD_NORM_CAP.

    `<norm>_val_loss` and `<norm>_max_grad_norm` are those of the reference setting, the loss a mean over seeds;
    `<norm>_best_val_loss` is the lowest mean over seeds of any setting, at `<norm>_best_max_lr` and
    `<norm>_best_warmup_steps`. Spikes are counted, and `diverged`, `stalled` asked, over all runs of the norm; the step
    is that of the earliest divergence. `<norm>_settings_<fault>` counts the settings in which any run has the fault.
    """
    table = [dict(zip(NORM_TABLE_COLUMNS, row, strict=True)) for row in norm_table_rows(results, data)]
    figures: dict[str, float] = {
        "runs": len(results),
        "seeds": len(config.seeds),
        "settings": len(config.max_lrs) * len(config.warmup_steps),
        "vocab_size": data.vocab_size,
        "unigram_entropy": data.unigram_entropy,
        "unigram_val_loss": data.unigram_val_loss,
    }
    for norm in config.norms:
        rows = [row for row in table if row["norm"] == norm]
        reference, best = rows[0], min(rows, key=lambda row: row["val_loss"])
        figures |= {
            f"{norm}_val_loss": min(reference["val_loss"], LOSS_CAP),
            f"{norm}_best_val_loss": min(best["val_loss"], LOSS_CAP),
            f"{norm}_best_max_lr": best["max_lr"],
            f"{norm}_best_warmup_steps": best["warmup_steps"],
            f"{norm}_loss_spikes": sum(row["loss_spikes"] for row in rows),
            f"{norm}_diverged": int(any(row["diverged"] for row in rows)),
            f"{norm}_diverged_at_step": min((row["diverged_at_step"] for row in rows if row["diverged"]), default=-1),
            f"{norm}_stalled": int(any(row["stalled"] for row in rows)),
            f"{norm}_max_grad_norm": min(reference["max_grad_norm"], GRAD_NORM_CAP),
            f"{norm}_settings_spiked": sum(row["loss_spikes"] > 0 for row in rows),
            f"{norm}_settings_diverged": sum(row["diverged"] > 0 for row in rows),
            f"{norm}_settings_stalled": sum(row["stalled"] > 0 for row in rows),
        }
    return figures


def _place(result: RunResult) -> tuple:
    """Where a run stands in the grid, as in SETTING_COLUMNS."""
    return result.setting.norm, result.setting.max_lr, result.setting.warmup_steps
