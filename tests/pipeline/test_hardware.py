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


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"nproc": 4, "max_restarts": 3}, {"standalone": True, "nproc_per_node": "4", "max_restarts": 3}),
        (
            {"nproc": "gpu", "max_restarts": 2, "nnodes": 3, "rdzv_endpoint": "node1:29400"},
            {"nnodes": "3", "nproc_per_node": "gpu", "max_restarts": 2, "standalone": False, "local_addr": None}
            | {"rdzv_backend": "c10d", "rdzv_endpoint": "node1:29400", "rdzv_id": "gpt2"},
        ),
        ({**TWO_MACHINES, "local_addr": "10.0.0.2"}, {"local_addr": "10.0.0.2"}),
    ],
)
def test_torchrun_gets_processes_restarts_and_meeting_place(changed, expected):
    parsed = vars(parse(configure(**changed)))
    expected = {**expected, "module": True, "training_script": "stages.train"}
    assert {key: parsed[key] for key in expected} == expected


@pytest.mark.parametrize("endpoint", ["node1:29400", "10.0.0.1:1", "node1.cluster.example:65535", "[fd00::1]:29400"])
def test_a_host_or_address_with_a_port_is_an_endpoint(endpoint):
    assert parse(configure(nnodes=2, rdzv_endpoint=endpoint)).rdzv_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["node1", "node1:", ":29400", "node1:port", "node 1:29400", "a:b:29400", "fd00::1:29400", "", 29400]
)
def test_anything_else_is_no_endpoint(endpoint):
    with pytest.raises(UserError, match=rf"^tiny\.hardware\.rdzv_endpoint = {re.escape(repr(endpoint))}: "):
        configure(nnodes=2, rdzv_endpoint=endpoint)


@pytest.mark.parametrize(
    "changed",
    [
        *({"nproc": nproc} for nproc in (0, -1, 2.5, True, "foo", "2", None, [2])),
        *({"nnodes": 0}, {"nnodes": "1:2"}, {"max_restarts": -1}, {"threads": 0}, {"workers": 1.5}),
        *({"local_addr": "10.0.0.2 "}, {"node_rank": 0}),
    ],
)
def test_a_wrong_value_is_refused_with_key_and_value(changed):
    ((key, value),) = changed.items()
    with pytest.raises(UserError, match=rf"^tiny\.hardware\.{key} = {re.escape(repr(value))}"):
        configure(**changed)


def test_several_machines_need_a_meeting_place():
    with pytest.raises(UserError, match=r"^tiny\.hardware: nnodes=2 needs rdzv_endpoint"):
        configure(nnodes=2)


def launch(folder: Path, **changed) -> subprocess.CompletedProcess:
    """`ensure_torchrun` in a folder with a params.yaml, with torchrun replaced by a print of its arguments."""
    values = {"scale": "short", "short": {"hardware": {**HARDWARE, **changed}}}
    (folder / "params.yaml").write_text(json.dumps(values))
    script = (
        "import os, sys; os.execv = lambda path, command: sys.exit(print(*command, sep='\\n'))\n"
        "from gpt2.pipeline.command import reporting; from gpt2.pipeline.hardware import ensure_torchrun\n"
        "with reporting('train'): ensure_torchrun('stages.train')\n"
        "print('in this process')"
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "changed", [{"nproc": "gpu", **TWO_MACHINES}, {"nproc": 1, "max_restarts": 2}, {"nproc": 3, "max_restarts": 0}]
)
def test_several_processes_or_restarts_are_started_by_torchrun(tmp_path, changed):
    done = launch(tmp_path, **changed)
    _, *command = done.stdout.splitlines()
    arguments = configure(**changed).torchrun_arguments()
    assert command == ["-m", "torch.distributed.run", *arguments, "-m", "stages.train"], done.stderr


def test_one_process_without_restarts_needs_no_torchrun(tmp_path):
    assert launch(tmp_path, nproc=1, max_restarts=0).stdout == "in this process\n"


def test_wrong_hardware_is_refused_before_anything_starts(tmp_path):
    done = launch(tmp_path, nproc=0, max_restarts=-1)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert done.stderr.startswith("train: short.hardware.nproc = 0: ")
    assert "short.hardware.max_restarts = -1: " in done.stderr
