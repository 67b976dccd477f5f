"""Pre-LN, Post-LN and DeepNorm trained side by side: norm × learning rate × warm-up × seed on a small, deep model."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from gpt2.data import eval_windows, sample_windows
from gpt2.dist import Precision, autocast, setup_device
from gpt2.evaluate import mean_loss
from gpt2.hardware import HardwareConfig
from gpt2.model import GPT, GPTConfig, Norm
from gpt2.optim import AdamConfig, OptimConfig, build_optimizer, lr_at
from gpt2.shape import ModelShape
from gpt2.shards import TokenSet
from gpt2.stability import DivergenceWatch, count_spikes, has_stalled

RUN_COLUMNS = (
    *("norm", "max_lr", "warmup_steps", "seed", "val_loss", "loss_spikes"),
    *("diverged", "diverged_at_step", "stalled", "max_grad_norm"),
)
CURVE_COLUMNS = ("norm", "max_lr", "warmup_steps", "seed", "step", "loss", "grad_norm")


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
    # Windows of one step, and windows of one forward pass.
    batch_windows: PositiveInt
    micro_batch: PositiveInt
    precision: Precision
    # Tokens taken from the end of the training split, and from the start of the validation split.
    train_tokens: PositiveInt
    eval_tokens: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> "NormStudyConfig":
        if max(self.warmup_steps) >= self.max_steps:
            raise ValueError(f"warmup_steps={list(self.warmup_steps)} must be less than max_steps={self.max_steps}")
        if self.train_tokens < self.batch_windows * self.block_size:
            raise ValueError(
                f"train_tokens={self.train_tokens} must fill one batch of batch_windows × block_size = "
                f"{self.batch_windows * self.block_size}; raise it"
            )
        return self


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    norm: Norm
    max_lr: float
    warmup_steps: int
    seed: int


@dataclass(frozen=True)
class StudyData:
    """Windows of token ids (N, T + 1), renumbered to the ids that occur, and the training split's unigram entropy."""

    train: torch.Tensor
    val: torch.Tensor
    vocab_size: int
    unigram_entropy: float


@dataclass(frozen=True)
class RunResult:
    """Loss and gradient norm of every step, and the final validation loss."""

    setting: Setting
    losses: list[float]
    grad_norms: list[float]
    val_loss: float
    diverged_at_step: int


def load_study_data(config: NormStudyConfig, train: TokenSet, val: TokenSet) -> StudyData:
    """Cut the slices and renumber their ids densely.

    A slice uses a fraction of the vocabulary; ids that never occur would only cost time in the classifier.
    """
    start = max(0, train.n_tokens - config.train_tokens - 1)
    train_windows = eval_windows(train, config.block_size, config.train_tokens, start)
    val_windows = eval_windows(val, config.block_size, config.eval_tokens)
    both = torch.cat([train_windows, val_windows])
    ids, dense = torch.unique(both, return_inverse=True)
    return StudyData(dense[: len(train_windows)], dense[len(train_windows) :], len(ids), train.unigram_entropy)


def run_study(config: NormStudyConfig, data: StudyData, hardware: HardwareConfig) -> list[RunResult]:
    """All runs of the study in the order norm, learning rate, warm-up, seed; on CPUs several at a time."""
    settings = [
        Setting(*values)
        for values in itertools.product(config.norms, config.max_lrs, config.warmup_steps, config.seeds)
    ]
    if torch.cuda.is_available():
        device = setup_device(hardware)
        return [train_run(setting, config, data, device) for setting in settings]
    # A run is too small to share: one thread each beats all threads on one.
    with ProcessPoolExecutor(
        hardware.threads,
        mp_context=get_context("spawn"),
        initializer=setup_device,
        initargs=(hardware, hardware.threads),
    ) as pool:
        futures = [pool.submit(train_run, setting, config, data, torch.device("cpu")) for setting in settings]
        return [future.result() for future in futures]


def train_run(setting: Setting, config: NormStudyConfig, data: StudyData, device: torch.device) -> RunResult:
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
    optimizer = build_optimizer(model, schedule)
    losses, grad_norms, watch = [], [], DivergenceWatch()
    diverged_at_step = -1
    for step in range(config.max_steps):
        samples = np.arange(step * config.batch_windows, (step + 1) * config.batch_windows)
        batch = data.train[sample_windows(samples, len(data.train), setting.seed)].to(device)
        loss = 0.0
        for windows in batch.split(config.micro_batch):
            with autocast(device, config.precision):
                part = model(windows[:, :-1], windows[:, 1:]) * (len(windows) / len(batch))
            part.backward()
            loss += part.item()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        if watch.update(loss, grad_norm):
            diverged_at_step = step
            break
        losses.append(loss)
        grad_norms.append(grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    val_loss = mean_loss(model, data.val, config.micro_batch, config.precision)
    return RunResult(setting, losses, grad_norms, val_loss, diverged_at_step)


def run_rows(results: Sequence[RunResult], unigram_entropy: float) -> list[tuple]:
    """One row a run, as in RUN_COLUMNS."""
    return [
        (
            *(r.setting.norm, r.setting.max_lr, r.setting.warmup_steps, r.setting.seed, r.val_loss),
            *(count_spikes(r.losses), int(r.diverged_at_step >= 0), r.diverged_at_step),
            *(int(has_stalled(r.val_loss, unigram_entropy)), max(r.grad_norms, default=0.0)),
        )
        for r in results
    ]


def curve_rows(results: Sequence[RunResult]) -> list[tuple]:
    """One row a step of each run, as in CURVE_COLUMNS."""
    return [
        (r.setting.norm, r.setting.max_lr, r.setting.warmup_steps, r.setting.seed, step + 1, loss, grad_norm)
        for r in results
        for step, (loss, grad_norm) in enumerate(zip(r.losses, r.grad_norms, strict=True))
    ]


def wide_rows(results: Sequence[RunResult], config: NormStudyConfig, quantity: str) -> list[list]:
    """Rows of step and `quantity` ("losses" or "grad_norms") of each norm's reference run; empty after divergence."""
    curves = [getattr(_reference_runs(results, config, norm)[0], quantity) for norm in config.norms]
    return [[step + 1, *values] for step, values in enumerate(itertools.zip_longest(*curves, fillvalue=""))]


def _reference_runs(results: Sequence[RunResult], config: NormStudyConfig, norm: str) -> list[RunResult]:
    """The runs of a norm at the first learning rate and warm-up, one for each seed."""
    setting = (norm, config.max_lrs[0], config.warmup_steps[0])
    return [r for r in results if (r.setting.norm, r.setting.max_lr, r.setting.warmup_steps) == setting]


def study_figures(results: Sequence[RunResult], config: NormStudyConfig, data: StudyData) -> dict[str, float]:
    """Figures of metrics/norm_study.json.

    `<norm>_val_loss` and `<norm>_max_grad_norm` are those of the reference setting, the loss a mean over seeds;
    `<norm>_best_val_loss` is the lowest mean over seeds of any setting, at `<norm>_best_max_lr`. Spikes are counted,
    and `diverged`, `stalled` asked, over all runs of the norm; the step is that of the earliest divergence.
    """
    figures: dict[str, float] = {
        "runs": len(results),
        "unigram_entropy": data.unigram_entropy,
        "vocab_size": data.vocab_size,
    }
    for norm in config.norms:
        rows = [dict(zip(RUN_COLUMNS, row, strict=True)) for row in run_rows(results, data.unigram_entropy)]
        rows = [row for row in rows if row["norm"] == norm]
        reference = _reference_runs(results, config, norm)
        by_setting: dict[tuple, list[float]] = {}
        for row in rows:
            by_setting.setdefault((row["max_lr"], row["warmup_steps"]), []).append(row["val_loss"])
        best = min(by_setting, key=lambda setting: np.mean(by_setting[setting]))
        figures |= {
            f"{norm}_val_loss": float(np.mean([r.val_loss for r in reference])),
            f"{norm}_best_val_loss": float(np.mean(by_setting[best])),
            f"{norm}_best_max_lr": best[0],
            f"{norm}_loss_spikes": sum(row["loss_spikes"] for row in rows),
            f"{norm}_diverged": max(row["diverged"] for row in rows),
            f"{norm}_diverged_at_step": min((row["diverged_at_step"] for row in rows if row["diverged"]), default=-1),
            f"{norm}_stalled": max(row["stalled"] for row in rows),
            f"{norm}_max_grad_norm": max(max(r.grad_norms, default=0.0) for r in reference),
        }
    return figures
