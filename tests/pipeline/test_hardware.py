"""torchrun gets from section `hardware` what it needs, for one machine and for several, and only what can work."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import build
from tests.closure import ROOT
from tests.settings import HARDWARE

TWO_MACHINES = {"nnodes": 2, "rdzv_endpoint": "node1:29400"}


def configure(**changed) -> HardwareConfig:
    return build(HardwareConfig, {**HARDWARE, **changed}, "tiny.hardware")


def parse(config: HardwareConfig):
    """The printed arguments as torchrun itself understands them."""
    return parse_args([*config.torchrun_arguments(), "-m", "stages.train"])


def test_one_machine_needs_no_meeting_place():
    assert configure(nproc=4, max_restarts=3).torchrun_arguments() == [
        *("--standalone", "--nproc-per-node=4", "--max-restarts=3"),
    ]
    parsed = parse(configure(nproc=4, max_restarts=3))
    assert (parsed.standalone, parsed.nproc_per_node, parsed.max_restarts) == (True, "4", 3)
    assert (parsed.module, parsed.training_script) == (True, "stages.train")


def test_several_machines_meet_at_the_endpoint_under_one_name():
    parsed = parse(configure(nproc="gpu", max_restarts=2, nnodes=3, rdzv_endpoint="node1:29400"))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("3", "gpu", 2)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id) == ("c10d", "node1:29400", "gpt2")
    assert (parsed.standalone, parsed.local_addr) == (False, None)


def test_a_machine_may_tell_its_address():
    assert parse(configure(**TWO_MACHINES, local_addr="10.0.0.2")).local_addr == "10.0.0.2"


@pytest.mark.parametrize("endpoint", ["node1:29400", "10.0.0.1:1", "node1.cluster.example:65535", "[fd00::1]:29400"])
def test_a_host_or_address_with_a_port_is_an_endpoint(endpoint):
    assert parse(configure(nnodes=2, rdzv_endpoint=endpoint)).rdzv_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["node1", "node1:", ":29400", "node1:port", "node 1:29400", "a:b:29400", "fd00::1:29400", "", 29400]
)
def test_anything_else_is_no_endpoint(endpoint):
    with pytest.raises(UserError, match=rf"^tiny\.hardware\.rdzv_endpoint = {re.escape(repr(endpoint))}: "):
        configure(nnodes=2, rdzv_endpoint=endpoint)


@pytest.mark.parametrize("nproc", [0, -1, 2.5, True, "foo", "2", None, [2]])
def test_processes_are_counted_or_one_for_each_gpu(nproc):
    with pytest.raises(UserError) as raised:
        configure(nproc=nproc)
    assert str(raised.value) == (
        f"tiny.hardware.nproc = {nproc!r}: must be a number of processes from 1 on, or gpu for one on every visible GPU"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nnodes": 2}, "tiny.hardware: nnodes=2 needs rdzv_endpoint, host:port of one of the machines"),
        ({"nnodes": 0}, "tiny.hardware.nnodes = 0: Input should be greater than 0"),
        ({"nnodes": "1:2"}, "tiny.hardware.nnodes = '1:2': Input should be a valid integer"),
        ({"max_restarts": -1}, "tiny.hardware.max_restarts = -1: Input should be greater than or equal to 0"),
        ({"threads": 0}, "tiny.hardware.threads = 0: Input should be greater than 0"),
        ({"workers": 1.5}, "tiny.hardware.workers = 1.5: Input should be a valid integer"),
        ({"local_addr": "10.0.0.2 "}, "tiny.hardware.local_addr = '10.0.0.2 ': String should match pattern"),
        ({"node_rank": 0}, "tiny.hardware.node_rank = 0 is not a known key"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_rule(changed, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        configure(**changed)


def launch(folder: Path, **changed) -> subprocess.CompletedProcess:
    """`ensure_torchrun` in a folder with a params.yaml, with torchrun replaced by a print of its arguments."""
    values = {"scale": "short", "short": {"hardware": {**HARDWARE, **changed}}}
    (folder / "params.yaml").write_text(json.dumps(values))
    script = (
        "import os, sys; os.execv = lambda path, command: sys.exit(print(*command, sep='\\n'))\n"
        "from gpt2.pipeline.command import reporting; from gpt2.pipeline.launch import ensure_torchrun\n"
        "with reporting('train'): ensure_torchrun('stages.train')\n"
        "print('in this process')"
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_several_processes_or_restarts_are_started_by_torchrun(tmp_path):
    for changed in ({"nproc": "gpu", **TWO_MACHINES}, {"nproc": 1, "max_restarts": 2}, {"nproc": 3, "max_restarts": 0}):
        done = launch(tmp_path, **changed)
        _, *command = done.stdout.splitlines()
        arguments = configure(**changed).torchrun_arguments()
        assert command == ["-m", "torch.distributed.run", *arguments, "-m", "stages.train"], done.stderr


def test_one_process_without_restarts_needs_no_torchrun(tmp_path):
    assert launch(tmp_path, nproc=1, max_restarts=0).stdout == "in this process\n"


def test_wrong_hardware_is_refused_before_anything_starts(tmp_path):
    done = launch(tmp_path, nproc=0, max_restarts=-1)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("train: short.hardware.nproc = 0: must be a number of processes")
    assert "short.hardware.max_restarts = -1: " in done.stderr
    assert "Traceback" not in done.stderr
