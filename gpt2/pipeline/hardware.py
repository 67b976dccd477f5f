"""Processes, threads and nodes, and the start of torchrun. They change the run time, never which data a run sees."""

import os
import sys

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from gpt2.pipeline.interrupt import LAUNCHER, TORCHRUN_MARK
from gpt2.pipeline.params import Config, load


class HardwareConfig(Config):
    """Section `hardware`, read at launch and no dependency of any stage."""

    # Training processes on each machine: a number, or `gpu` for one on every visible GPU.
    nproc: int | str
    # CPU threads for arithmetic, shared by the processes of a machine. Fixed, since the bits of a sum depend on it.
    threads: PositiveInt
    # Processes for text: reading, tokenizing.
    workers: PositiveInt
    # How many times torchrun restarts the processes after one died; they resume from the last checkpoint.
    max_restarts: NonNegativeInt
    # Machines that train together, and host:port on one of them where they meet.
    nnodes: PositiveInt
    rdzv_endpoint: str | None = Field(pattern=r"^[^\s:]+:\d+$|^\[[^\s\]]+\]:\d+$")
    # Address at which the others reach this machine; null means its host name.
    local_addr: str | None = Field(pattern=r"^\S+$")

    @field_validator("nproc", mode="before")
    @classmethod
    def _number_or_gpu(cls, value: object) -> object:
        if value == "gpu" or (type(value) is int and value > 0):
            return value
        raise ValueError("must be a number of processes from 1 on, or gpu for one on every visible GPU")

    @model_validator(mode="after")
    def _machines_meet(self) -> "HardwareConfig":
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes={self.nnodes} needs rdzv_endpoint, host:port of one of the machines")
        return self

    def torchrun_arguments(self) -> list[str]:
        """Command line of torchrun, up to the module to run."""
        arguments = [f"--nproc-per-node={self.nproc}", f"--max-restarts={self.max_restarts}"]
        if self.nnodes == 1:
            return ["--standalone", *arguments]
        meeting = [f"--nnodes={self.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.rdzv_endpoint}"]
        # Each run has a store of its own, so all runs may use the same name.
        named = ["--rdzv-id=gpt2", *([f"--local-addr={self.local_addr}"] if self.local_addr else [])]
        return [*meeting, *named, *arguments]


def ensure_torchrun(module: str) -> None:
    """Replace this process by torchrun running `module`, unless torchrun started it or has nothing to do.

    One process that is not restarted after a crash needs no torchrun. Raises UserError if section `hardware` is wrong.
    """
    hardware = load("hardware", HardwareConfig)
    if TORCHRUN_MARK in os.environ or (hardware.nproc, hardware.nnodes, hardware.max_restarts) == (1, 1, 0):
        return
    # The shared store would hand the addresses of dead processes to the restarted ones (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # torchrun takes the place of this process and so its number.
    os.environ[LAUNCHER] = str(os.getpid())
    command = [sys.executable, "-m", "torch.distributed.run", *hardware.torchrun_arguments(), "-m", module]
    os.execv(sys.executable, command)
