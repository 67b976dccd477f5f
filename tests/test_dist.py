"""Processes and devices: a group of one, a group of two, and what both promise."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2.dist import Dist, autocast, distributed, setup_device
from gpt2.hardware import HardwareConfig
from tests.closure import ROOT

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# What each process of the group of two below does; it prints one line.
MEMBER = """
import torch
from gpt2.dist import distributed
from gpt2.hardware import HardwareConfig

try:
    with distributed(HardwareConfig(nproc=2, threads=4, workers=1)) as dist:
        given = torch.tensor([1.0, 10.0]) * (dist.rank + 1)
        total = dist.sum(given)
        dist.barrier()
        print(dist.rank, dist.is_main, dist.world_size, total is given, total.tolist(), torch.get_num_threads())
        raise KeyError
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
    return HardwareConfig(nproc=1, threads=threads, workers=1)


def test_without_a_launcher_there_is_a_group_of_one(alone):
    with distributed(make_hardware(threads=2)) as dist:
        assert (dist.rank, dist.local_rank, dist.world_size, dist.is_main) == (0, 0, 1, True)
        assert torch.get_num_threads() == 2
        assert not torch.distributed.is_initialized()
        given = torch.tensor([1.5, -2.0])
        assert dist.sum(given) is given and given.tolist() == [1.5, -2.0]
        dist.barrier()


def test_only_rank_0_is_main():
    assert [Dist(rank, 0, 3, torch.device("cpu")).is_main for rank in range(3)] == [True, False, False]


@pytest.mark.parametrize(("threads", "processes", "each"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (1, 8, 1)])
def test_processes_share_the_threads_and_have_one_at_least(alone, threads, processes, each):
    setup_device(make_hardware(threads), processes)
    assert torch.get_num_threads() == each


def test_two_processes_sum_and_part():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = []
    for rank in range(2):
        launched = dict(zip(LAUNCHED, map(str, (rank, rank, 2, 2)), strict=True))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        members.append(
            subprocess.Popen(
                [sys.executable, "-c", MEMBER],
                env={**os.environ, **launched, **group},
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path("/"),
            )
        )
    lines = [member.communicate(timeout=120)[0].splitlines() for member in members]
    # The group is taken down although its block ends in an error.
    assert lines[0] == ["0 True 2 True [3.0, 30.0] 2", "False"]
    assert lines[1] == ["1 False 2 True [3.0, 30.0] 2", "False"]


def test_precision_is_that_of_the_products_alone():
    weight = torch.ones(2, 2)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (weight @ weight).dtype == dtype
        assert weight.dtype == (weight @ weight).dtype == torch.float32
