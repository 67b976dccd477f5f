"""A short training of a pruned model after its closed-form repair."""

import copy

import numpy as np
import torch

from gpt2.data.order import TrainOrder
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.train.optim import AdamConfig, OptimConfig
from gpt2.train.short_runs import train_windows


def recover(model: GPT, order: TrainOrder, steps: int, max_lr: float) -> GPT:
    """A copy of the model after `steps` of AdamW in fp32 on the batches of `order`; 0 steps keep the weights.

    The rate rises to max_lr over a tenth of the steps and falls to a tenth of it; the other settings are GPT-2's usual
    ones. Raises UserError if the training diverges.
    """
    recovered = copy.deepcopy(model)
    if not steps:
        return recovered
    adam = AdamConfig(beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0).model_dump()
    config = OptimConfig(**adam, max_steps=steps, max_lr=max_lr, min_lr=max_lr / 10, warmup_steps=steps // 10)
    idx, targets = order.batch(0, 0, steps * order.batch_windows)
    windows, numbers = torch.cat([idx, targets[:, -1:]], 1), np.arange(len(idx)).reshape(steps, -1)
    curve = train_windows(recovered.train(), config, windows, numbers, order.batch_windows, "float32")
    if curve.diverged_at_step >= 0:
        raise UserError(
            f"prune.recovery_max_lr={max_lr}: the training of the pruned model diverged at step "
            f"{curve.diverged_at_step}; lower the rate"
        )
    return recovered.eval()
