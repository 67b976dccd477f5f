"""Processes, threads and devices: the only file that talks to torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from gpt2.files import UserError
from gpt2.hardware import HardwareConfig

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Dist:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Mixed precision for the forward pass: bfloat16 products and activations with fp32 weights."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def setup_device(hardware: HardwareConfig, processes: int = 1, local_rank: int = 0) -> torch.device:
    """Fix the thread count of this process and return its device; on a GPU fp32 products may use TF32."""
    torch.set_num_threads(max(1, hardware.threads // processes))
    if torch.cuda.is_available():
        if local_rank >= (visible := torch.cuda.device_count()):
            raise UserError(f"hardware.nproc={hardware.nproc} exceeds the {visible} visible GPUs; lower it")
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def distributed(hardware: HardwareConfig) -> Iterator[Dist]:
    """Join the group that torchrun describes in the environment; without torchrun, a group of one."""
    rank, local_rank, world_size = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    world_size = max(1, world_size)
    device = setup_device(hardware, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank)
    if world_size == 1:
        yield Dist(0, 0, 1, device)
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Dist(rank, local_rank, world_size, device)
    finally:
        torch.distributed.destroy_process_group()
