"""The files around the code: locked versions, the Makefile, continuous integration, and a README that holds."""

import os
import re
import tomllib
from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpt2.pipeline.params import SCALES
from tests.closure import ROOT, imported_packages
from tests.declared import STAGES, all_written, files_of_git, is_ignored, lies_in, load_yaml


def test_locked_versions_are_exact_and_cover_the_project():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # Names and versions alone: no address, option or path of the machine that wrote them.
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==\d[0-9a-z.]*", pin)] == []
    locked = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    assert len(locked) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    unmet = [
        str(requirement)
        for requirement in wanted
        if (version := locked.get(canonicalize_name(requirement.name))) is None or version not in requirement.specifier
    ]
    assert unmet == []


def test_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    names = {"ruamel": "ruamel-yaml", "vl_convert": "vl-convert-python"}
    files = {path.relative_to(ROOT) for folder in ("gpt2", "stages") for path in (ROOT / folder).rglob("*.py")}
    imported = {canonicalize_name(names.get(name, name)) for name in imported_packages(files)}
    # Triton comes with torch where there is a GPU, and is needed there alone.
    assert imported - declared == {"triton"}


def test_continuous_integration_runs_targets_of_the_makefile():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert make_targets() >= set(re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE)) >= {"test", "verify"}


def test_environment_scratch_and_drawings_are_ignored_by_git():
    assert [path for path in (".venv/", ".scratch/", "dvc_plots/", "gpt2/__pycache__/") if not is_ignored(path)] == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=DOCUMENTS)
def document(request) -> str:
    """The text of each document in turn."""
    return (ROOT / request.param).read_text(encoding="utf-8")


def code_in(text: str) -> list[str]:
    """The code of a Markdown text: lines of fenced blocks and spans between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def exists(path: str) -> bool:
    """Whether a path of a document is in Git, a result of the pipeline, or text that the user is to supply.

    <name> and * stand for any name.
    """
    path = re.sub("<[^>]+>", "*", path.rstrip("/").removeprefix("./"))
    results = all_written()
    if "*" in path:
        return any(PurePosixPath(known).match(path) for known in files_of_git() | results)
    sources = {load_yaml("params.yaml")[scale]["prepare"].get("path") for scale in SCALES}
    inside = any(lies_in(path, result) for result in results)
    return inside or path in sources or any(lies_in(known, path) for known in files_of_git() | results)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_the_documents_lead_to_files(name):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8"))
    paths = [os.path.normpath(PurePosixPath(name).parent / target) for target in targets if "://" not in target]
    assert [path for path in paths if not exists(path)] == []


def test_paths_in_the_documents_exist(document):
    top = {name.split("/")[0] for name in files_of_git() | all_written() if "/" in name}
    words = {word.strip("\"'(),:;") for code in code_in(document) for word in re.split(r"[\s=│├└─]+", code)}
    in_folders = {word for word in words if word.split("/")[0] in top and "/" in word}
    by_name = {word for word in words if re.fullmatch(r"[\w.-]+\.(py|md|yaml|toml|lock|html)", word)}
    names = {PurePosixPath(path).name for path in files_of_git() | all_written()}
    assert len(in_folders) > 0
    assert {word for word in in_folders if not exists(word)} | (by_name - names) == set()


def test_commands_in_the_documents_exist(document):
    lines = code_in(document)
    targets = {word for line in lines for word in re.findall(r"\bmake ((?:[a-z]+ ?)+)", line) for word in word.split()}
    assert targets and targets <= make_targets()
    modules = {name for line in lines for name in re.findall(r"-m ((?:gpt2|stages|tests|tools|bench)[\w.]*)", line)}
    files = files_of_git()
    places = {name: name.replace(".", "/") for name in modules}
    assert [name for name, place in places.items() if not {f"{place}.py", f"{place}/__main__.py"} & files] == []


def test_stages_and_parameters_named_in_the_documents_exist(document):
    values = load_yaml("params.yaml")
    for line in code_in(document):
        for option, words in re.findall(r"\bdvc repro((?: -\w| --[\w-]+)*)((?: [\w-]+)*)", line):
            assert set(words.split()) <= STAGES.keys(), f"{line}: {option}"
        for key in re.findall(r"(?:-S|--set-param) ['\"]?([\w.]+)=", line):
            node = values
            for part in key.split("."):
                assert part in node, f"{line}: {key} is not in params.yaml"
                node = node[part]
