"""dvc.yaml as data, and what Git makes of the paths in it."""

import subprocess
from functools import cache
from pathlib import Path, PurePosixPath

from ruamel.yaml import YAML

from tests.closure import ROOT


@cache
def load_yaml(name: str) -> dict:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text(encoding="utf-8"))


PIPELINE = load_yaml("dvc.yaml")
STAGES: dict[str, dict] = PIPELINE["stages"]


def module_of(stage: str) -> Path:
    return Path("stages", f"{stage.replace('-', '_')}.py")


def paths(entries: list) -> dict[str, dict]:
    """Paths and options of the entries of `outs` or `metrics`."""
    return {
        path: options for entry in entries for path, options in (entry if type(entry) is dict else {entry: {}}).items()
    }


def written(stage: str) -> dict[str, dict]:
    """Outs and metrics of a stage, with their options."""
    return paths(STAGES[stage]["outs"]) | paths(STAGES[stage]["metrics"])


def code_deps(stage: str) -> set[str]:
    """Packages and source files that a stage lists."""
    return {dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in ("gpt2", "stages")}


def data_deps(stage: str) -> set[str]:
    return set(STAGES[stage]["deps"]) - code_deps(stage)


def all_written() -> set[str]:
    return {path for stage in STAGES for path in written(stage)}


def lies_in(path: str, folder: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


def is_ignored(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT).returncode == 0


@cache
def files_of_git() -> set[str]:
    """Files that are in Git or would be added to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")) - {""}
