"""AdamW with GPT-2's decay groups or Muon next to it, and the learning-rate schedule as a function of the step."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from gpt2.pipeline.params import Config
from gpt2.train.muon import Muon


class AdamConfig(Config):
    """What stays the same over a run."""

    beta1: float = Field(gt=0, lt=1)
    beta2: float = Field(gt=0, lt=1)
    weight_decay: float = Field(ge=0)
    # Gradients are scaled down to this global L2 norm.
    grad_clip: PositiveFloat


class OptimConfig(AdamConfig):
    """Optimizer and schedule of a run of max_steps optimizer steps."""

    # adamw for all parameters, or muon for the matrices of the blocks and adamw for the others.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Of Muon's average of gradients.
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    max_steps: PositiveInt
    # Linear warm-up to max_lr over warmup_steps, then a cosine down to min_lr at max_steps.
    max_lr: PositiveFloat
    min_lr: float = Field(ge=0)
    warmup_steps: NonNegativeInt

    @model_validator(mode="after")
    def _ordered(self) -> "OptimConfig":
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr={self.min_lr} must not exceed max_lr={self.max_lr}; lower min_lr")
        # A run may have its length in epochs instead.
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be less than max_steps={self.max_steps}; shorten the warm-up"
            )
        return self


def lr_at(step: int, config: OptimConfig) -> float:
    """Learning rate of `step`, counted from 0. The first step of a warm-up of n steps has max_lr / n."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.max_lr - config.min_lr)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, biases and layer norms do not (as in nanoGPT)."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Together:
    """Optimizers with parameters of their own, as one: the part of torch's interface that training uses."""

    def __init__(self, *members: torch.optim.Optimizer):
        self._members = members
        self.param_groups = [group for member in members for group in member.param_groups]
        # No parameter has two optimizers, so one map holds the state of all.
        self.state = members[0].state
        for member in members:
            member.state = self.state

    def step(self) -> None:
        for member in self._members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self._members:
            member.zero_grad(set_to_none)


Optimizer: TypeAlias = torch.optim.Optimizer | Together


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with one fused update for all parameters, or Muon for the blocks' matrices."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = [module.weight for module in linear] if config.optimizer == "muon" else []
    groups = decay_groups([p for p in model.parameters() if all(p is not m for m in matrices)], config.weight_decay)
    adam = torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
    if not matrices:
        return adam
    return Together(Muon(matrices, config.max_lr, config.muon_momentum, config.weight_decay), adam)
