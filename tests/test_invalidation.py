"""An edit re-runs the stages that use the edited package and no others, as DVC's status says.

The pipeline runs in a copy of the repository, with each command replaced by one that only writes the outputs.
"""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from tests.closure import ROOT
from tests.declared import STAGES, files_of_git, written

# Stages that DVC calls changed after an edit of the file; `check-params` depends on the whole library.
ALL = set(STAGES)
MODELS = ALL - {"check-params", "prepare", "benchmark", "tokenize", "report"}
EDITS = {
    "pipeline/files.py": ALL,
    "data/order.py": MODELS | {"tokenize"},
    "model/gpt.py": MODELS,
    "train/loop.py": {"tokenizer-study", "norm-study", "train", "prune", "replicates"},
    "prepare/corpus.py": {"prepare", "benchmark", "tokenize", "tokenizer-study"},
    "prepare/hub.py": {"prepare", "benchmark"},
    "prepare/sources.py": {"prepare"},
    "tokenizer/bpe.py": {"tokenize", "tokenizer-study"},
    "tokenizer/encodings.py": {"tokenize", "tokenizer-study", "generate"},
    "hellaswag/items.py": {"benchmark", "tokenize", "train", "hellaswag", "prune", "replicates"},
    "hellaswag/scoring.py": {"train", "hellaswag", "prune", "replicates"},
    "hellaswag/benchmark.py": {"benchmark", "hellaswag", "prune", "replicates"},
    "hellaswag/__main__.py": {"hellaswag", "prune", "replicates"},
    "huggingface/pretrained.py": {"train"},
    "huggingface/card.py": set(),
    "sampling/sampling.py": {"generate", "prune"},
    "heads/redundancy.py": {"head-similarity", "prune", "replicates"},
    "prune/repair.py": {"prune", "replicates"},
    "replicates/study.py": {"replicates"},
    "norm_study/study.py": {"norm-study"},
    "tokenizer_study/words.py": {"tokenizer-study"},
    "report/claims.py": {"report"},
    "report/report.md.j2": {"report"},
    "check/preflight.py": set(),
    "generate.py": {"generate"},
    "export.py": set(),
    "status.py": set(),
    "params.py": set(),
    "__main__.py": set(),
}
WRITE = """\
import sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    path = path if path.suffix else path / "file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository in which the pipeline has run."""
    folder = tmp_path_factory.mktemp("invalidation") / "repository"
    for name in files_of_git():
        if (ROOT / name).is_file() and name.split("/")[0] in ("gpt2", "stages", "params.yaml", ".dvcignore"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    pipeline = {"stages": copy.deepcopy(STAGES)}
    for name, stage in pipeline["stages"].items():
        stage["cmd"] = " ".join([sys.executable, "write.py", *sorted(written(name))])
    (folder / "write.py").write_text(WRITE)
    YAML().dump(pipeline, folder / "dvc.yaml")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=folder, check=True)
    return folder


def changed_stages(folder: Path) -> set[str]:
    """Stages that DVC would run again."""
    with Repo(str(folder)) as repo:
        # Outside the working directory a stage is called PATH:NAME.
        return {name.rpartition(":")[2] for name in repo.status()}


def test_every_package_is_in_the_table():
    packages = {path.name for path in (ROOT / "gpt2").iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in (ROOT / "gpt2").glob("*.py")} - {"__init__.py"}
    assert {name.split("/")[0] for name in EDITS} == packages | files


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_stages_of_its_package(repository, name):
    path = repository / "gpt2" / name
    content = path.read_text(encoding="utf-8")
    try:
        path.write_text(f"{content}# edited\n", encoding="utf-8")
        assert changed_stages(repository) == EDITS[name] | {"check-params"}
    finally:
        path.write_text(content, encoding="utf-8")


def test_bytecode_and_what_editors_leave_change_no_stage(repository):
    names = ("model/gpt.py~", "model/.gpt.py.swp", "train/__pycache__/loop.cpython-311.pyc", "data/.DS_Store", "x.orig")
    leftovers = [repository / "gpt2" / name for name in names]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"anything")
    try:
        assert changed_stages(repository) == set()
    finally:
        for path in leftovers:
            path.unlink()
