"""A short training of a pruned model, so that what is left makes up for what is gone further than in closed form."""

import copy
import math
from collections.abc import Mapping

from torch import Tensor, nn

from gpt2.data.order import TrainOrder
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.train.optim import OptimConfig, build_optimizer, lr_at

DIGITS = 6


def recover(model: GPT, order: TrainOrder, steps: int, max_lr: float) -> GPT:
    """A copy of the model after so many steps of AdamW in fp32, each on a batch of `order`; of 0, the same weights.

    The rate rises to max_lr over a tenth of the steps and falls to a tenth of it; the rest is as usual for GPT-2.
    """
    recovered = copy.deepcopy(model)
    if not steps:
        return recovered
    config = OptimConfig(
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        grad_clip=1.0,
        max_steps=steps,
        max_lr=max_lr,
        min_lr=max_lr / 10,
        warmup_steps=steps // 10,
    )
    device, optimizer = model.wte.weight.device, build_optimizer(recovered, config)
    recovered.train()
    for step in range(steps):
        idx, targets = order.batch(step, 0, order.batch_windows)
        recovered(idx.to(device), targets.to(device)).backward()
        nn.utils.clip_grad_norm_(recovered.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return recovered.eval()


def summarise_recovery(
    figures: Mapping[str, float], recovered: GPT, steps: int, windows: Tensor, batch_size: int
) -> dict[str, float]:
    """Figures of metrics/prune.json: how many steps and, if any, what they make of those of the saved model.

    `figures` are those before; the perplexity is that on windows (N, T + 1).
    """
    if not steps:
        return {"recovery_steps": 0}
    perplexity = math.exp(mean_loss(recovered, windows, batch_size))
    return {
        "recovery_steps": steps,
        "pruned_perplexity_before_recovery": figures["pruned_perplexity"],
        "pruned_perplexity": round(perplexity, DIGITS),
        "pruned_perplexity_rise_percent": round(100 * (perplexity / figures["baseline_perplexity"] - 1), DIGITS),
    }
