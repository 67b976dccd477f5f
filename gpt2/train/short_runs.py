"""Short trainings of small models for the studies: one loop, and several runs at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from gpt2.data.order import sample_windows
from gpt2.model.config import GPTConfig, ModelShape, Norm
from gpt2.model.dist import Precision, autocast, setup_device
from gpt2.model.gpt import GPT
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.workers import in_order
from gpt2.train.optim import AdamConfig, OptimConfig, build_optimizer, lr_at
from gpt2.train.stability import DivergenceWatch

R = TypeVar("R")


def _require_distinct(values: tuple[R, ...]) -> tuple[R, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must not name a value twice; remove one")
    return values


# Values of a parameter, each of which has runs of its own.
Distinct = Annotated[tuple[R, ...], AfterValidator(_require_distinct)]


class ShortRunConfig(ModelShape, AdamConfig):
    """What the parameters of all studies have: their own, small model and optimizer."""

    # The final learning rate as a fraction of the largest.
    min_lr_fraction: float = Field(ge=0, le=1)
    # Windows of one step, and at most of one forward pass.
    batch_windows: PositiveInt
    micro_batch: PositiveInt
    precision: Literal["float32", "bfloat16"]

    def shape(self, vocab_size: int, norm: Norm) -> GPTConfig:
        """The shape of a model."""
        return GPTConfig(**self.model_dump(include={*ModelShape.model_fields}), vocab_size=vocab_size, norm=norm)

    def schedule(self, max_lr: float, **given: Any) -> OptimConfig:
        """Optimizer and schedule of a run; `given` are the other fields of OptimConfig."""
        adam = self.model_dump(include={*AdamConfig.model_fields})
        return OptimConfig(**adam, max_lr=max_lr, min_lr=max_lr * self.min_lr_fraction, **given)


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of every step before a divergence, and the largest gradient norm, that of the diverging
    step included. `diverged_at_step` counts from 0 and is -1 if there was no divergence."""

    losses: list[float]
    grad_norms: list[float]
    max_grad_norm: float
    diverged_at_step: int


def order_windows(n_windows: int, steps: int, batch_windows: int, seed: int) -> np.ndarray:
    """The windows of each step, (steps, batch_windows): all of them once before any comes again."""
    return sample_windows(np.arange(steps * batch_windows), n_windows, seed).reshape(steps, batch_windows)


def train_windows(
    model: GPT, schedule: OptimConfig, windows: Tensor, order: np.ndarray, micro_batch: int, precision: Precision
) -> Curve:
    """Train `model` on its device with the `windows` (N, T + 1) that `order` names for each step; stops where it
    diverges."""
    device = model.wte.weight.device
    optimizer = build_optimizer(model, schedule)
    losses, grad_norms, watch = [], [], DivergenceWatch()
    diverged_at_step = -1
    for step, chosen in enumerate(order):
        batch = windows[chosen].to(device)
        loss = 0.0
        for part in batch.split(micro_batch):
            with autocast(device, precision):
                share = model(part[:, :-1], part[:, 1:]) * (len(part) / len(batch))
            share.backward()
            loss += share.item()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.grad_clip).item()
        if watch.update(loss, grad_norm):
            diverged_at_step = step
            break
        losses.append(loss)
        grad_norms.append(grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Not max(), which may pass over what is not a number.
    return Curve(losses, grad_norms, float(np.max([*grad_norms, grad_norm])), diverged_at_step)


def run_each(function: Callable[..., R], tasks: Iterable[tuple], hardware: HardwareConfig) -> list[R]:
    """`function(*task, device)` for each task, in their order; one process for each GPU, or for each thread of a CPU.

    A run is too small to share: on a CPU, one thread for each run is faster than all threads for one.
    """
    gpus = torch.cuda.device_count()
    workers = gpus or hardware.threads
    # Taken by each worker in turn.
    place = get_context("spawn").Value("i", 0)
    prepare = partial(_take_device, hardware, 1 if gpus else workers, place)
    if workers == 1:
        prepare()
    return list(in_order(partial(_run_here, function), tasks, workers, prepare))


def _take_device(hardware: HardwareConfig, processes: int, place: Any) -> None:
    with place:
        setup_device(hardware, processes, place.value)
        place.value += 1


def _run_here(function: Callable[..., R], task: tuple) -> R:
    on_gpu = torch.cuda.is_available()
    return function(*task, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
