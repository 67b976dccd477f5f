"""What training takes: processes, memory, and time at a rate measured on this machine."""

import os
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2.check.schema import Sections
from gpt2.model.config import GPTConfig
from gpt2.model.dist import setup_device
from gpt2.model.gpt import GPT
from gpt2.model.loss import CHUNK_BYTES
from gpt2.pipeline.params import PARAMS_FILE, REMEDY, build, read
from gpt2.tokenizer.encodings import GPT2_VOCAB_SIZE, trained_size
from gpt2.train.setup import set_precision
from gpt2.train.short_runs import train_windows

LOCK = Path("dvc.lock")
# fp32 weights, gradients and two moments, in bytes per parameter.
TRAINING_BYTES = 16
# Saved for the backward pass, in bytes per token, channel and layer: measured with GPT-2 (124M).
ACTIVATION_BYTES = {"float32": 64, "bfloat16": 40, "bfloat16_mixed": 44}
# Steps to measure at most, and the seconds after which no further step starts.
MEASURED_STEPS, MEASURED_SECONDS = 20, 10.0
# Tokens of a measured step on a CPU, at most: a full step would take minutes there, at about the same rate.
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """The parameters of one scale."""

    scale: str
    block: Sections
    model: GPTConfig
    # Whether dvc.lock records the stage prepare with these parameters.
    is_prepared: bool

    @property
    def processes(self) -> int:
        """Training processes on this machine; one where `gpu` asks for GPUs that it does not have."""
        nproc = self.block.hardware.nproc
        return max(1, torch.cuda.device_count()) if nproc == "gpu" else int(nproc)

    @property
    def world_size(self) -> int:
        """Training processes on all machines."""
        return self.processes * self.block.hardware.nnodes

    @cached_property
    def n_params(self) -> int:
        with torch.device("meta"):
            return GPT(self.model).n_params()

    @property
    def training_memory(self) -> float:
        """Bytes that one training process holds on its device."""
        model, train = self.model, self.block.train
        saved = ACTIVATION_BYTES[train.precision] * train.micro_batch * model.block_size * model.n_embd * model.n_layer
        chunk = CHUNK_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
        return TRAINING_BYTES * self.n_params + saved + 2 * chunk


def load_plan(values: dict[str, Any], scale: str) -> Plan:
    """Return the plan of `scale` from params.yaml as parsed. Raises UserError if the scale has a fault."""
    block = build(Sections, values.get(scale), scale, REMEDY)
    vocab_size = trained_size(block.tokenize.encoding) or GPT2_VOCAB_SIZE
    model = build(
        GPTConfig, values[scale]["model"], f"{scale}.model", REMEDY, norm=values.get("norm"), vocab_size=vocab_size
    )
    lock = read(LOCK).get("stages", {}) if LOCK.is_file() else {}
    recorded = lock.get("prepare", {}).get("params", {}).get(str(PARAMS_FILE), {})
    return Plan(scale, block, model, recorded.get(f"{scale}.prepare") == values[scale]["prepare"])


def measure_rate(plan: Plan) -> tuple[float, str]:
    """Return the tokens per second of all processes, by real optimizer steps of one process here, and the basis."""
    train, block_size = plan.block.train, plan.model.block_size
    device = setup_device(plan.block.hardware, plan.processes)
    n_windows = train.accumulation(block_size, plan.world_size) * train.micro_batch
    if device.type == "cpu":
        n_windows = min(n_windows, max(1, CPU_TOKENS // block_size))
    # Random tokens, so that the rate can be measured before there is a text.
    windows, order = torch.randint(plan.model.vocab_size, (n_windows, block_size + 1)), np.arange(n_windows)[None]
    model = GPT(plan.model).to(device)
    set_precision(model, train)
    forward: Any = torch.compile(model) if train.compile else model
    schedule = train.model_copy(update={"max_steps": train.warmup_steps + 1, "epochs": None})
    step = partial(train_windows, forward, schedule, windows, order, train.micro_batch, train.precision)
    # The first step compiles and allocates memory; it is not timed.
    step()
    started, steps, seconds = time.perf_counter(), 0, 0.0
    while steps < MEASURED_STEPS and seconds < MEASURED_SECONDS:
        step()
        steps, seconds = steps + 1, time.perf_counter() - started
    basis = f"measured now in {steps} steps at a load of {os.getloadavg()[0]:.1f}, times {plan.world_size} processes"
    return plan.world_size * steps * n_windows * block_size / seconds, basis
