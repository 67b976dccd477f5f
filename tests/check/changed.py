"""The shipped params.yaml with changed values."""

import copy

from gpt2.check.estimate import Plan, load_plan
from gpt2.pipeline.params import read
from tests.closure import ROOT

SHIPPED = read(ROOT / "params.yaml")


def change(scale: str, changes: dict[str, object]) -> dict:
    """All values, those of `scale` changed as given by {"section.key": value}."""
    values = copy.deepcopy(SHIPPED)
    for key, value in changes.items():
        section, name = key.split(".")
        values[scale][section][name] = value
    return values


def plan_of(scale: str = "tiny", **changes: object) -> Plan:
    """The plan of a scale; `section__key=value` changes one."""
    return load_plan(change(scale, {key.replace("__", "."): value for key, value in changes.items()}), scale)
