"""Short trainings of small models for the studies: one loop, and several runs at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.data.order import sample_windows
from gpt2.model.dist import Precision, autocast, setup_device
from gpt2.model.gpt import GPT
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.workers import in_order
from gpt2.train.optim import OptimConfig, build_optimizer, lr_at
from gpt2.train.stability import DivergenceWatch

R = TypeVar("R")


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
    parameters = list(model.parameters())
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
        grad_norm = nn.utils.clip_grad_norm_(parameters, schedule.grad_clip).item()
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

    A run is too small to share: on a CPU, one thread for each beats all threads on one.
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
