"""Pre-LN, Post-LN and DeepNorm trained side by side: norm × learning rate × warm-up × seed on a small, deep model."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch.nn.functional import normalize

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.model.config import GPTConfig, ModelShape, Norm
from gpt2.model.dist import Precision, autocast
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import Config
from gpt2.train.optim import AdamConfig, OptimConfig
from gpt2.train.short_runs import Curve, order_windows, run_each, train_windows

# The arm of GPT-2: AdamW and a tied output matrix.
MAIN = "main"


class NormArm(Config):
    """All norms with one optimizer and kind of output matrix; a run for each learning rate, warm-up and seed."""

    # adamw for all parameters | muon for the matrices of the blocks and adamw for the others.
    optimizer: Literal["adamw", "muon"]
    # Whether the output matrix is the token embedding, as in GPT-2, or a matrix of its own.
    tied: bool
    max_lrs: tuple[PositiveFloat, ...] = Field(min_length=1)
    warmup_steps: tuple[NonNegativeInt, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> "NormArm":
        for name in ("max_lrs", "warmup_steps", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must not name a value twice; remove one")
        return self


class NormStudyConfig(ModelShape, AdamConfig):
    """Section `norm_study`: its own, small model and optimizer.

    Weights start from N(0, 0.02 sqrt(768 / n_embd)), so that a matrix has at any width the gain that it has in GPT-2 of
    768 channels (mu-P, Yang et al. 2022). At 0.02 the blocks of a narrow model start as identities.
    """

    norms: tuple[Norm, ...] = Field(min_length=1)
    # By name; `main` is AdamW with a tied output matrix, as GPT-2.
    arms: dict[str, NormArm]
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

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""
        return 0.02 * math.sqrt(768 / self.n_embd)

    @model_validator(mode="after")
    def _fits(self) -> "NormStudyConfig":
        main = self.arms.get(MAIN)
        if main is None or not main.tied or main.optimizer != "adamw":
            raise ValueError(f"arms must have an arm {MAIN} with optimizer adamw and tied true; add it")
        for name, arm in self.arms.items():
            if max(arm.warmup_steps) >= self.max_steps:
                raise ValueError(
                    f"arms.{name}.warmup_steps={list(arm.warmup_steps)} must be less than max_steps={self.max_steps}"
                )
        if self.train_tokens < self.batch_windows * self.block_size:
            raise ValueError(
                f"train_tokens={self.train_tokens} must fill one batch of batch_windows × block_size = "
                f"{self.batch_windows * self.block_size}; raise it"
            )
        if len(set(self.norms)) < len(self.norms):
            raise ValueError(f"norms={list(self.norms)} must not name a value twice; remove one")
        return self


@dataclass(frozen=True)
class NormSetting:
    """One run of the study."""

    arm: str
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
    """Curve of a run and what its last weights do on validation windows.

    `val_loss`, `token_cosine` and `grad_ratio` may be infinite or not a number if the run diverged. It did so at step
    max_steps, counted from 0, if the validation was the first to see it.
    """

    setting: NormSetting
    curve: Curve
    val_loss: float
    token_cosine: float
    grad_ratio: float


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
    """All runs in the order arm, norm, learning rate, warm-up, seed; on CPUs several at a time."""
    settings = [
        NormSetting(name, *values)
        for name, arm in config.arms.items()
        for values in itertools.product(config.norms, arm.max_lrs, arm.warmup_steps, arm.seeds)
    ]
    return run_each(train_norm_run, [(setting, config, data) for setting in settings], hardware)


def train_norm_run(setting: NormSetting, config: NormStudyConfig, data: StudyData, device: torch.device) -> RunResult:
    """Train one model from its seed; stops where it diverges."""
    values, arm = config.model_dump(), config.arms[setting.arm]
    shape = GPTConfig(
        **{key: values[key] for key in ModelShape.model_fields}, vocab_size=data.vocab_size, norm=setting.norm
    )
    schedule = OptimConfig(
        **{key: values[key] for key in AdamConfig.model_fields},
        optimizer=arm.optimizer,
        max_steps=config.max_steps,
        max_lr=setting.max_lr,
        min_lr=setting.max_lr * config.min_lr_fraction,
        warmup_steps=setting.warmup_steps,
    )
    model = GPT(shape, setting.seed, tied=arm.tied, init_std=config.init_std).to(device)
    order = order_windows(len(data.train), config.max_steps, config.batch_windows, setting.seed)
    curve = train_windows(model, schedule, data.train, order, config.micro_batch, config.precision)
    val_loss = mean_loss(model, data.val, config.micro_batch, config.precision)
    if curve.diverged_at_step < 0 and not math.isfinite(val_loss):
        curve = replace(curve, diverged_at_step=config.max_steps)
    windows = data.val[: config.micro_batch].to(device)
    with autocast(device, config.precision):
        return RunResult(setting, curve, val_loss, token_cosine(model, windows), grad_ratio(model, windows))


@torch.no_grad()
def token_cosine(model: GPT, windows: torch.Tensor) -> float:
    """Mean cosine between the final hidden states of different tokens of a window; 1 where all tokens are alike.

    `windows` are (N, T + 1). That tokens become alike with depth is rank collapse (Dong et al. 2021).
    """
    hidden = normalize(model.hidden(windows[:, :-1]).float(), dim=-1)
    T = hidden.shape[1]
    # The sum over all pairs is the squared norm of the sum; T of them are tokens with themselves.
    return ((hidden.sum(1).square().sum(-1) - T) / (T * (T - 1))).mean().item()


def grad_ratio(model: GPT, windows: torch.Tensor) -> float:
    """Norm of the loss's gradient by the first block's parameters over that by the last's, on `windows` (N, T + 1)."""
    loss = model(windows[:, :-1], windows[:, 1:])
    first, last = (
        torch.nn.utils.get_total_norm(torch.autograd.grad(loss, [*block.parameters()], retain_graph=True))
        for block in (model.h[0], model.h[-1])
    )
    return (first / last).item()
