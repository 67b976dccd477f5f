"""AdamW with GPT-2's decay groups, and the learning-rate schedule as a function of the step."""

import math

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from gpt2.params import Config


class AdamConfig(Config):
    """What stays the same over a run."""

    beta1: float = Field(gt=0, lt=1)
    beta2: float = Field(gt=0, lt=1)
    weight_decay: float = Field(ge=0)
    # Gradients are scaled down to this global L2 norm.
    grad_clip: PositiveFloat


class OptimConfig(AdamConfig):
    """Optimizer and schedule of a run of max_steps optimizer steps."""

    max_steps: PositiveInt
    # Linear warm-up to max_lr over warmup_steps, then a cosine down to min_lr at max_steps.
    max_lr: PositiveFloat
    min_lr: float = Field(ge=0)
    warmup_steps: NonNegativeInt

    @model_validator(mode="after")
    def _ordered(self) -> "OptimConfig":
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr={self.min_lr} must not exceed max_lr={self.max_lr}; lower min_lr")
        if self.warmup_steps >= self.max_steps:
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


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, biases and layer norms do not (as in nanoGPT)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with one fused update for all parameters."""
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
