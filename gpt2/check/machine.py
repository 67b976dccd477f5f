"""The machine that a run would use, looked at without disturbing a run in progress: cores, memory, GPUs, arithmetic."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
# Edge of the square products that are timed, enough work for the device, and for how long each library is tried.
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
PRODUCT_SECONDS = 0.5


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; memory in bytes, `free` is None where no tool tells it. Ampere and later are (8, 0) and up."""

    name: str
    total: int
    free: int | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, memory in bytes (all of it, and what can still be had), visible GPUs."""

    cores: int
    memory: int
    available: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def device_type(self) -> str:
        """Where models run: "cuda" as soon as there is a GPU."""
        return "cuda" if self.gpus else "cpu"


def look() -> Machine:
    """The machine as it is now. No GPU is opened: a context would take memory from whoever computes on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *_control_group_limits()]
    return Machine(cores, min(total for total, _ in limits), min(free for _, free in limits), _gpus())


def _control_group_limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Limit and what is left of it, for each control group (version 2) around this process that sets one."""
    try:
        place = own.read_text(encoding="utf-8").strip().splitlines()[-1].partition("::")[2].lstrip("/")
    except (OSError, IndexError):
        return []
    limits = []
    for group in [root / place, *(root / place).parents]:
        try:
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        except (OSError, ValueError):
            # No such file, or the word max: no limit here.
            continue
        limits.append((limit, max(0, limit - used)))
    return limits


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    free = _free_gpu_memory() or [None] * len(properties)
    if len(free) != len(properties):
        free = [None] * len(properties)
    return tuple(
        Gpu(device.name, device.total_memory, left, (device.major, device.minor))
        for device, left in zip(properties, free, strict=True)
    )


def _free_gpu_memory() -> list[int | None]:
    """Free bytes of each visible GPU by nvidia-smi, in its order; empty without it."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(mebibytes) * 2**20 if mebibytes.isdigit() else None for mebibytes in told]


def product_rate(device_type: str, threads: int, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products, on a CPU by either library that torch has for fp32."""
    threads_before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    size, fastest = PRODUCT_SIZE[device_type], float("inf")
    try:
        a, b = (torch.randn(size, size, device=device_type).to(dtype) for _ in range(2))
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            deadline = time.perf_counter() + PRODUCT_SECONDS
            while (started := time.perf_counter()) < deadline:
                # Fetching an element waits for a GPU.
                (a @ b)[0, 0].item()
                fastest = min(fastest, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(precision_before)
    return 2 * size**3 / fastest
