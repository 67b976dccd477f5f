"""Processes, threads and devices: the only file that talks to torch.distributed."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig

# bfloat16: products, activations and residual stream in bfloat16; weights, moments and sums of gradients in fp32.
# bfloat16_mixed: the residual stream in fp32 too.
Precision = Literal["float32", "bfloat16", "bfloat16_mixed"]


@dataclass(frozen=True)
class Dist:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    # The rank that keeps the resume state and writes the outputs.
    main_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == self.main_rank

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def share(self, value: Any) -> Any:
        """The main process's `value`, which JSON can hold, in every process."""
        if self.world_size == 1:
            return value
        # As bytes of JSON: torch.distributed's own exchange of objects unpickles what it receives.
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = int(self._broadcast(torch.tensor([len(text)])))
        text = self._broadcast(text if self.is_main else torch.empty(length, dtype=torch.uint8))
        return json.loads(text.numpy().tobytes())

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main process's `tensors` in every process, on the CPU."""
        if self.world_size == 1:
            return tensors
        kinds = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        return {
            name: self._broadcast(tensors[name] if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype)))
            for name, (shape, dtype) in self.share(kinds).items()
        }

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """Overwritten by the main process's tensor of the same shape."""
        carried = tensor.to(self.device)
        torch.distributed.broadcast(carried, src=self.main_rank)
        return carried.cpu()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """float32, or bfloat16 for the products and activations of the forward pass, of fp32 weights."""
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


def make_deterministic() -> None:
    """Let only such kernels run as give the same bits every time, flash attention's backward among them.

    Raises RuntimeError where an operation has none. Must come before the first product on the GPU.
    """
    # cuBLAS takes its workspace from this, and only with a fixed one are its sums in a fixed order.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in its stub


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
        yield Dist(rank, local_rank, world_size, device, _elect_main(rank, world_size, device))
    except BaseException as error:
        # The frames that the error passed hold DistributedDataParallel. Outliving the group, it would wait for the end
        # of gloo's thread with Python's lock held, and that thread may need the lock to end (torch 2.13).
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        torch.distributed.destroy_process_group()


def _elect_main(rank: int, world_size: int, device: torch.device) -> int:
    """The first rank on the machine where DVC waits for the outputs; without DVC, rank 0.

    Machines that meet by c10d get their ranks in an order that nobody chooses.
    """
    under_dvc = torch.zeros(world_size, device=device)
    under_dvc[rank] = "DVC_STAGE" in os.environ
    torch.distributed.all_reduce(under_dvc)
    return int(under_dvc.argmax())
