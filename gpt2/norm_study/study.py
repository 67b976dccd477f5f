"""Pre-LN, Post-LN and DeepNorm compared: norm × learning rate × warm-up × seed on a small, deep model."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.model.config import Norm
from gpt2.model.dist import autocast
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import Config
from gpt2.train.short_runs import Distinct, ShortRunConfig, order_windows, run_each, train_windows
from gpt2.train.stability import count_spikes, has_stalled

# The arm of GPT-2: AdamW and a tied output matrix.
MAIN = "main"


class NormArm(Config):
    """All norms with one optimizer and kind of output matrix; a run for each learning rate, warm-up and seed."""

    # adamw for all parameters | muon for the matrices of the blocks and adamw for the others.
    optimizer: Literal["adamw", "muon"]
    # Whether the output matrix is the token embedding, as in GPT-2, or a matrix of its own.
    tied: bool
    max_lrs: Distinct[PositiveFloat] = Field(min_length=1)
    warmup_steps: Distinct[NonNegativeInt] = Field(min_length=1)
    seeds: Distinct[int] = Field(min_length=1)


class NormStudyConfig(ShortRunConfig):
    """Section `norm_study`.

    Weights start from N(0, 0.02 sqrt(768 / n_embd)): at any width a matrix then has the gain that it has in GPT-2 with
    768 channels (mu-P, Yang et al. 2022). At 0.02 the blocks of a narrow model start as identities.
    """

    norms: Distinct[Norm] = Field(min_length=1)
    # By name; `main` is AdamW with a tied output matrix, as GPT-2.
    arms: dict[str, NormArm]
    max_steps: PositiveInt
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
        if self.train_tokens < (batch := self.batch_windows * self.block_size):
            raise ValueError(
                f"train_tokens={self.train_tokens} must fill one batch of batch_windows × block_size={batch}; raise it"
            )
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

    train: Tensor
    val: Tensor
    unigram_entropy: float
    unigram_val_loss: float


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
    return StudyData(train_windows, val_windows, *unigram_losses(train_windows, val_windows))


def unigram_losses(train: Tensor, val: Tensor) -> tuple[float, float]:
    """Mean loss in nats of guessing each target by its share of the targets of `train`: on `train` and on `val`.

    Both are windows (N, T + 1). An id that `train` lacks counts as seen once.
    """
    n_ids = int(max(train.max(), val.max())) + 1
    seen, asked = (np.bincount(windows[:, 1:].flatten(), minlength=n_ids) for windows in (train, val))
    losses = -np.log(np.maximum(seen, 1) / seen.sum())
    return float(losses @ seen / seen.sum()), float(losses @ asked / asked.sum())


def run_study(config: NormStudyConfig, data: StudyData, hardware: HardwareConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of runs.csv and of curves.csv, in the order arm, norm, learning rate, warm-up, seed; on CPUs several runs
    at a time."""
    settings = [
        NormSetting(name, *values)
        for name, arm in config.arms.items()
        for values in itertools.product(config.norms, arm.max_lrs, arm.warmup_steps, arm.seeds)
    ]
    rows, curves = zip(*run_each(train_norm_run, [(s, config, data) for s in settings], hardware), strict=True)
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def train_norm_run(
    setting: NormSetting, config: NormStudyConfig, data: StudyData, device: torch.device
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train one model from its seed; stops where it diverges.

    Returns the row of the run and its curve: loss and gradient norm of each step before a divergence, steps counted
    from 1. The row's `val_loss`, `token_cosine` and `grad_ratio`, those of the last weights on validation windows, may
    be infinite or not a number if the run diverged. `diverged_at_step` counts from 0, is -1 without a divergence, and
    max_steps if the validation was the first to see it.
    """
    arm, shape = config.arms[setting.arm], config.shape(config.vocab_size, setting.norm)
    schedule = config.schedule(
        setting.max_lr, optimizer=arm.optimizer, max_steps=config.max_steps, warmup_steps=setting.warmup_steps
    )
    model = GPT(shape, setting.seed, tied=arm.tied, init_std=config.init_std).to(device)
    order = order_windows(len(data.train), config.max_steps, config.batch_windows, setting.seed)
    curve = train_windows(model, schedule, data.train, order, config.micro_batch, config.precision)
    val_loss = mean_loss(model, data.val, config.micro_batch, config.precision)
    diverged = curve.diverged_at_step >= 0 or not math.isfinite(val_loss)
    windows = data.val[: config.micro_batch].to(device)
    with autocast(device, config.precision):
        diagnosis = {"token_cosine": token_cosine(model, windows), "grad_ratio": grad_ratio(model, windows)}
    row = {
        **asdict(setting),
        "val_loss": val_loss,
        "loss_spikes": count_spikes(curve.losses),
        "diverged": int(diverged),
        "diverged_at_step": config.max_steps if diverged and curve.diverged_at_step < 0 else curve.diverged_at_step,
        # A run that diverged has not stalled as well: it broke off.
        "stalled": int(not diverged and has_stalled(val_loss, data.unigram_val_loss)),
        "max_grad_norm": curve.max_grad_norm,
        **diagnosis,
    }
    losses, grad_norms = np.array(curve.losses, float), np.array(curve.grad_norms, float)
    steps = np.arange(1, len(losses) + 1)
    return row, pd.DataFrame({**asdict(setting), "step": steps, "loss": losses, "grad_norm": grad_norms})


@torch.no_grad()
def token_cosine(model: GPT, windows: Tensor) -> float:
    """Mean cosine between the final hidden states of different tokens of a window; 1 where all tokens are alike.

    `windows` are (N, T + 1). That tokens become alike with depth is rank collapse (Dong et al. 2021).
    """
    hidden = normalize(model.hidden(windows[:, :-1]).float(), dim=-1)
    T = hidden.shape[1]
    # The sum over all pairs is the squared norm of the sum; T of them are tokens with themselves.
    return ((hidden.sum(1).square().sum(-1) - T) / (T * (T - 1))).mean().item()


def grad_ratio(model: GPT, windows: Tensor) -> float:
    """Norm of the loss's gradient by the first block's parameters over that by the last's, on `windows` (N, T + 1)."""
    loss = model(windows[:, :-1], windows[:, 1:])
    first, last = (
        torch.nn.utils.get_total_norm(torch.autograd.grad(loss, [*block.parameters()], retain_graph=True))
        for block in (model.h[0], model.h[-1])
    )
    return (first / last).item()
