"""A stage leaves its speed file only if nothing it was built from changed on the way, and fails with words alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.model.config import ModelShape
from gpt2.pipeline.files import read_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import SPEED, Stage, peak_memory_gib
from tests.closure import ROOT, import_closure
from tests.settings import HARDWARE

MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
PARAMS = {"norm": "preln", "scale": "tiny", "tiny": {"hardware": HARDWARE, "model": MODEL}}
HEAD = """
from pathlib import Path
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage

with Stage("a-probe") as stage:
    config = stage.load("hardware", HardwareConfig)
    norm = stage.top("norm")
    stage.timed["threads"] = config.threads
"""


def set_params(folder: Path, **changed) -> None:
    # JSON is YAML.
    (folder / "params.yaml").write_text(json.dumps({**PARAMS, **changed}))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a params.yaml."""
    set_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_probe(folder: Path, body: str) -> subprocess.CompletedProcess:
    """Run a stage with this body from a copy of the modules that it imports."""
    for path in import_closure(Path("gpt2/pipeline/stage.py")) | import_closure(Path("gpt2/pipeline/hardware.py")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "stages" / "a_probe.py").write_text(f"{HEAD}    {body}\n")
    command = [sys.executable, "-m", "stages.a_probe"]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True)


def speed_files(folder: Path) -> list[str]:
    return [path.name for path in (folder / SPEED).glob("*")]


def test_a_stage_that_ends_well_writes_its_speed(folder):
    done = run_probe(folder, "pass")
    assert done.returncode == 0 and "a-probe: done in" in done.stderr, done.stderr
    assert speed_files(folder) == ["a_probe.json"]
    figures = read_json(folder / SPEED / "a_probe.json")
    assert figures.keys() == {"seconds", "peak_memory_gib", "threads"} and min(figures.values()) > 0


@pytest.mark.parametrize("edited", ["gpt2/pipeline/files.py", "gpt2/pipeline/hardware.py", "stages/a_probe.py"])
def test_a_stage_whose_source_was_edited_fails(folder, edited):
    done = run_probe(folder, f"Path({edited!r}).open('a').write('# edited')")
    assert done.returncode == 1
    assert f"a-probe: edited while the stage ran: {edited};" in done.stderr
    assert "Traceback" not in done.stderr
    assert speed_files(folder) == []


def test_an_edited_module_that_the_stage_did_not_import_is_accepted(folder):
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "other.py").touch()
    done = run_probe(folder, "Path('gpt2/other.py').write_text('edited = True')")
    assert done.returncode == 0, done.stderr


def test_only_a_fault_of_the_program_has_a_traceback(folder):
    done = run_probe(folder, "raise UserError('key = 3 must be 4; set it')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "a-probe: key = 3 must be 4; set it\n")
    done = run_probe(folder, "raise KeyError('bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert speed_files(folder) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm": "postln"}, "norm"),
        ({"tiny": {"model": {**MODEL, "n_layer": 3}}}, "model"),
        ({"scale": "full", "full": {"model": {**MODEL, "n_head": 4}}}, "model"),
    ],
)
def test_a_stage_whose_parameter_was_edited_fails(folder, changed, named):
    message = rf"probe: edited while the stage ran: params\.yaml \({named}\); .*dvc repro again"
    with pytest.raises(SystemExit, match=message), Stage("probe") as stage:
        stage.load("model", ModelShape)
        stage.top("norm")
        set_params(folder, **changed)
    assert speed_files(folder) == []


@pytest.mark.parametrize(
    "edits",
    [
        [{"norm": "postln", "short": {}}],
        [{"tiny": {"hardware": {**HARDWARE, "threads": 2}, "model": MODEL}}],
        [{"tiny": {"model": {**MODEL, "n_layer": 3}}}, {}],
    ],
    ids=["not read by the stage", "decides no result", "restored"],
)
def test_an_edit_of_parameters_that_changes_no_result_is_accepted(folder, edits):
    with Stage("probe") as stage:
        stage.load("model", ModelShape)
        assert stage.load("hardware", HardwareConfig).threads == 1
        for edit in edits:
            set_params(folder, **edit)
    assert speed_files(folder) == ["probe.json"]


def test_a_wrong_parameter_ends_the_stage_with_its_key(folder):
    set_params(folder, tiny={"hardware": {**HARDWARE, "nproc": 0}})
    with pytest.raises(SystemExit, match=r"probe: tiny\.hardware\.nproc"), Stage("probe") as stage:
        stage.load("hardware", HardwareConfig)
    assert speed_files(folder) == []


def test_a_process_that_is_not_the_main_one_writes_nothing(folder):
    with Stage("probe") as stage:
        stage.silence()
        stage.timed["tokens_per_s"] = 1.0
    assert speed_files(folder) == []


def test_peak_memory_counts_what_was_touched():
    held = bytearray(b"x") * 2**27
    assert len(held) / 2**30 < peak_memory_gib() < 1000
