"""Processes and devices: a group of one, a group of two, and what both promise."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2.model.dist import Dist, autocast, distributed, setup_device
from gpt2.pipeline.hardware import HardwareConfig
from tests.closure import ROOT

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# What each process of the group of two below does; it prints one line.
MEMBER = """
import weakref
import torch
from torch.nn.parallel import DistributedDataParallel
from gpt2.model.dist import distributed
from tests.model.test_dist import make_hardware

def fail(held):
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    held["model"] = weakref.ref(model)
    raise KeyError

def destroy(destroy=torch.distributed.destroy_process_group):
    print("model left:", held["model"]() is not None)
    destroy()

torch.distributed.destroy_process_group = destroy
try:
    with distributed(make_hardware(threads=4)) as dist:
        given = torch.tensor([1.0, 10.0]) * (dist.rank + 1)
        total = dist.sum(given)
        dist.barrier()
        print(dist.rank, dist.is_main, dist.world_size, total is given, total.tolist(), torch.get_num_threads())
        # 0.1 + 0.2 has no short decimal form, and the second tensor no elements.
        held = {"loss": 0.1 + 0.2, "name": "ä", "rows": [[1, 2.5]]} if dist.is_main else None
        tensors = {"a": torch.tensor([[0.1, 2.0]]), "b": torch.empty(0), "c": torch.tensor(7)} if dist.is_main else {}
        print(dist.share(held))
        print({name: (tensor.dtype, tensor.tolist()) for name, tensor in dist.share_tensors(tensors).items()})
        held = {}
        fail(held)
except KeyError:
    print(torch.distributed.is_initialized())
"""


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process that no launcher started; the thread count is put back."""
    threads = torch.get_num_threads()
    for key in LAUNCHED:
        monkeypatch.delenv(key, raising=False)
    yield
    torch.set_num_threads(threads)


def make_hardware(threads: int) -> HardwareConfig:
    return HardwareConfig(
        nproc=1, threads=threads, workers=1, max_restarts=0, nnodes=1, rdzv_endpoint=None, local_addr=None
    )


def test_without_a_launcher_there_is_a_group_of_one(alone):
    with distributed(make_hardware(threads=2)) as dist:
        assert (dist.rank, dist.local_rank, dist.world_size, dist.is_main) == (0, 0, 1, True)
        assert torch.get_num_threads() == 2
        assert not torch.distributed.is_initialized()
        given = torch.tensor([1.5, -2.0])
        assert dist.sum(given) is given and given.tolist() == [1.5, -2.0]
        dist.barrier()


def test_a_group_of_one_shares_with_itself():
    alone = Dist(0, 0, 1, torch.device("cpu"))
    held, tensors = {"a": None}, {"t": torch.ones(2)}
    assert alone.is_main and alone.share(held) is held and alone.share_tensors(tensors) is tensors


@pytest.mark.parametrize(("threads", "processes", "each"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (1, 8, 1)])
def test_processes_share_the_threads_and_have_one_at_least(alone, threads, processes, each):
    setup_device(make_hardware(threads), processes)
    assert torch.get_num_threads() == each


def run_pair(under_dvc: int | None = None) -> list[list[str]]:
    """The lines that each of two members prints; one of them may be told that DVC started it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = []
    for rank in range(2):
        launched = dict(zip(LAUNCHED, map(str, (rank, rank, 2, 2)), strict=True))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        given = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
        stage = {"DVC_STAGE": "train"} if rank == under_dvc else {}
        members.append(
            subprocess.Popen(
                [sys.executable, "-c", MEMBER],
                env={**given, **launched, **group, **stage},
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path("/"),
            )
        )
    return [member.communicate(timeout=120)[0].splitlines() for member in members]


SHARED = [
    "{'loss': 0.30000000000000004, 'name': 'ä', 'rows': [[1, 2.5]]}",
    "{'a': (torch.float32, [[0.10000000149011612, 2.0]]), 'b': (torch.float32, []), 'c': (torch.int64, 7)}",
]
ENDED = ["model left: False", "False"]


def test_two_processes_sum_share_and_part():
    lines = run_pair()
    # The group is taken down although its block ends in an error, and after the model that would wait for it.
    assert lines[0] == ["0 True 2 True [3.0, 30.0] 2", *SHARED, *ENDED]
    assert lines[1] == ["1 False 2 True [3.0, 30.0] 2", *SHARED, *ENDED]


def test_the_process_that_dvc_started_is_main_whatever_its_rank():
    lines = run_pair(under_dvc=1)
    assert [line[0].split()[1] for line in lines] == ["False", "True"]
    assert lines[0][1:] == lines[1][1:] == [*SHARED, *ENDED]


def test_precision_is_that_of_the_products_alone():
    weight = torch.ones(2, 2)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (weight @ weight).dtype == dtype
        assert weight.dtype == (weight @ weight).dtype == torch.float32
