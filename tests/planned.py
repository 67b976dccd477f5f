"""Plans, machines and text for tests of the preflight."""

import copy

from gpt2.check.corpus_size import Volume
from gpt2.check.machine import Gpu, Machine
from gpt2.check.workload import GIB, Plan, load_plan
from gpt2.pipeline.params import read
from tests.closure import ROOT

H200 = Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0))
LAPTOP = Machine(cores=2, memory=16 * GIB, available=12 * GIB)
SERVER = Machine(cores=64, memory=512 * GIB, available=500 * GIB, gpus=(H200, H200))
VOLUME = Volume(n_bytes=12e6, documents=12e3, bytes_per_token=3.0, basis="invented")


def change(changes: dict[str, object], scale: str = "tiny") -> dict:
    """The shipped params.yaml with values of one scale changed, given as {"section.key": value}."""
    values = copy.deepcopy(read(ROOT / "params.yaml"))
    for key, value in changes.items():
        section, name = key.split(".")
        values[scale][section][name] = value
    return values


def plan_of(scale: str = "tiny", **changes: object) -> Plan:
    """The shipped plan of a scale; `section__key=value` changes one."""
    return load_plan(change({key.replace("__", "."): value for key, value in changes.items()}, scale), scale)
