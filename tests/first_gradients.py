"""The gradients of the first step of the run in the current folder, as safetensors; for torchrun too."""

from pathlib import Path

from safetensors.torch import save_file

from gpt2.model.dist import distributed
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load
from gpt2.train.loop import Stepper
from gpt2.train.optim import build_optimizer
from tests.training_run import load_parts

if __name__ == "__main__":
    with distributed(load("hardware", HardwareConfig)) as dist:
        parts = load_parts(Path("."))
        stepper = Stepper(parts.model, build_optimizer(parts.model, parts.config), parts.config, parts.order, dist)
        loss, _ = stepper.backward(0)
        if dist.is_main:
            print("accumulation", stepper.accumulation, "loss", loss)
            save_file({name: p.grad.clone() for name, p in parts.model.named_parameters()}, "gradients.safetensors")
