"""What training takes: processes, memory, and time at a rate measured on this machine."""

import os
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpt2.data.order import TrainOrder
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist, make_deterministic, setup_device
from gpt2.model.gpt import GPT
from gpt2.model.loss import CHUNK_BYTES
from gpt2.pipeline.files import read_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, recorded_params
from gpt2.pipeline.stage import SPEED
from gpt2.prepare.prepare import PrepareConfig
from gpt2.tokenizer.encodings import GPT2_VOCAB_SIZE, trained_size
from gpt2.tokenizer.tokenize import TokenizeConfig
from gpt2.train.loop import Stepper, TrainConfig
from gpt2.train.optim import build_optimizer

RECORDED = SPEED / "train.json"
# fp32 weights, gradients and two moments, in bytes for each parameter.
TRAINING_BYTES = 16
# Saved for the backward pass, in bytes for each token, channel and layer: measured with GPT-2 (124M).
ACTIVATION_BYTES = {"float32": 64, "bfloat16": 40}
# Settings of training on which tokens per second depend.
RATE_KEYS = ("init_from", "tokens_per_step", "micro_batch", "precision", "compile", "deterministic", "optimizer")
# Steps after the first, and the time after which no further one is started.
MEASURED_STEPS, MEASURED_SECONDS = 20, 10.0
# A step of a large model would take minutes on a CPU, whose rate hardly depends on the tokens of a step.
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """The sections of one scale that decide whether it can run, and its whole block as parsed."""

    scale: str
    block: dict[str, Any]
    hardware: HardwareConfig
    prepare: PrepareConfig
    tokenize: TokenizeConfig
    model: GPTConfig
    train: TrainConfig

    @property
    def processes(self) -> int:
        """Training processes on this machine; one where `gpu` asks for GPUs that it does not have."""
        nproc = self.hardware.nproc
        return max(1, torch.cuda.device_count()) if nproc == "gpu" else int(nproc)

    @property
    def world_size(self) -> int:
        """Training processes on all machines."""
        return self.processes * self.hardware.nnodes

    @property
    def is_prepared(self) -> bool:
        """Whether the stage prepare last ran with the parameters of this plan."""
        return recorded_params("prepare").get("prepare") == self.block["prepare"]

    @cached_property
    def n_params(self) -> int:
        with torch.device("meta"):
            return GPT(self.model).n_params()

    @property
    def training_memory(self) -> float:
        """Bytes that one training process holds on its device."""
        model, train = self.model, self.train
        saved = ACTIVATION_BYTES[train.precision] * train.micro_batch * model.block_size * model.n_embd * model.n_layer
        chunk = CHUNK_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
        return TRAINING_BYTES * self.n_params + saved + 2 * chunk


def load_plan(values: dict[str, Any], scale: str) -> Plan:
    """The plan of `scale` from params.yaml as parsed. Raises UserError at the first section with a fault."""
    scaled = {**values, "scale": scale}
    tokenize = load("tokenize", TokenizeConfig, scaled)
    vocab_size = trained_size(tokenize.encoding) or GPT2_VOCAB_SIZE
    return Plan(
        scale,
        values[scale],
        load("hardware", HardwareConfig, scaled),
        load("prepare", PrepareConfig, scaled),
        tokenize,
        load("model", GPTConfig, scaled, norm=values.get("norm"), vocab_size=vocab_size),
        load("train", TrainConfig, scaled),
    )


def training_rate(plan: Plan) -> tuple[float, str]:
    """Tokens per second of all processes together, and where the figure comes from."""
    if rate := _recorded_rate(plan):
        return rate, f"{RECORDED} of the last run here, {plan.world_size} processes"
    (rate, steps), on_gpu = _measure_rate(plan), torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{plan.hardware.threads} CPU threads"
    times = plan.world_size if on_gpu else plan.hardware.nnodes
    basis = f"measured now in {steps} steps on {device} at a load of {os.getloadavg()[0]:.1f}, times {times}"
    return rate * times, basis


def _recorded_rate(plan: Plan) -> float:
    """The rate of the last run, if it was made here with the same model, settings, devices and processes; else 0."""
    then, now = recorded_params("train") | recorded_params("tokenize"), plan.block | {"norm": plan.model.norm}
    same = all(then.get(key) == now[key] for key in ("norm", "model", "tokenize"))
    if not same or any(then["train"].get(key) != now["train"].get(key) for key in RATE_KEYS):
        return 0.0
    # A committed record may come from another machine.
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", RECORDED], capture_output=True).returncode == 1
    speed = read_json(RECORDED) if changed and RECORDED.is_file() else {}
    on_gpu = "peak_gpu_memory_gib" in speed
    comparable = speed.get("processes") == plan.world_size and on_gpu == torch.cuda.is_available()
    return speed["tokens_per_s"] if comparable else 0.0


class _RandomTokens(TrainOrder):
    """Batches of random tokens, so that the rate can be measured before there is a text."""

    def __init__(self, model: GPTConfig):
        self.block_size, self._vocab_size = model.block_size, model.vocab_size

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self._vocab_size, (count, self.block_size + 1))
        return tokens[:, :-1], tokens[:, 1:]


def _measure_rate(plan: Plan) -> tuple[float, int]:
    """Tokens per second of real optimizer steps in one process, and their number."""
    device, block_size = setup_device(plan.hardware), plan.model.block_size
    if plan.train.deterministic:
        make_deterministic()
    passes, windows = plan.train.accumulation(block_size, plan.world_size), plan.train.micro_batch
    if device.type == "cpu":
        passes, windows = 1, max(1, CPU_TOKENS // block_size)
    tokens, length = passes * windows * block_size, plan.train.warmup_steps + 1 + MEASURED_STEPS
    changes = {"tokens_per_step": tokens, "micro_batch": windows, "max_steps": length, "epochs": None}
    config, model = plan.train.model_copy(update=changes), GPT(plan.model).to(device)
    stepper = Stepper(model, build_optimizer(model, config), config, _RandomTokens(plan.model), Dist(0, 0, 1, device))
    started, seconds, step = 0.0, 0.0, 0
    # The first step compiles and takes memory.
    for step in range(1 + MEASURED_STEPS):
        stepper.backward(step)
        stepper.clip()
        stepper.update(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = started or time.perf_counter()
        seconds = time.perf_counter() - started
        if step and seconds > MEASURED_SECONDS:
            break
    return step * tokens / seconds, step
