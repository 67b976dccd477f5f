"""Processes, threads and nodes. They change the run time, never which data a run sees."""

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from gpt2.pipeline.params import Config


class HardwareConfig(Config):
    """Section `hardware`, read at launch and no dependency of any stage."""

    # Training processes on each machine: a number, or `gpu` for one on every visible GPU.
    nproc: int | str
    # CPU threads for arithmetic, shared by the processes of a machine. Fixed, since the bits of a sum depend on it.
    threads: PositiveInt
    # Processes for text: reading, tokenizing.
    workers: PositiveInt
    # How often torchrun restarts the processes after one was lost; they resume from the last checkpoint.
    max_restarts: NonNegativeInt
    # Machines that train together, and host:port on one of them where they meet.
    nnodes: PositiveInt
    rdzv_endpoint: str | None = Field(pattern=r"^[^\s:]+:\d+$|^\[[^\s\]]+\]:\d+$")
    # Address under which the others reach this machine; none takes its host name.
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

    @property
    def is_single_process(self) -> bool:
        """Whether training is one process that nothing restarts."""
        return self.nproc == 1 and self.nnodes == 1 and self.max_restarts == 0

    def torchrun_arguments(self) -> list[str]:
        """Command line of torchrun, up to the module to run."""
        arguments = [f"--nproc-per-node={self.nproc}", f"--max-restarts={self.max_restarts}"]
        if self.nnodes == 1:
            return ["--standalone", *arguments]
        meeting = [f"--nnodes={self.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.rdzv_endpoint}"]
        # The store that the machines meet in lives and dies with the run, so the same name serves every run.
        named = ["--rdzv-id=gpt2", *([f"--local-addr={self.local_addr}"] if self.local_addr else [])]
        return [*meeting, *named, *arguments]
