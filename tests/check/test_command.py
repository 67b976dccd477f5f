"""The command: it tells what it found, ends with the right status, and leaves everything as it was."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zc.lockfile

from gpt2.check import __main__ as check
from gpt2.check import estimate as forecast
from gpt2.check import preflight
from gpt2.check.__main__ import examine, main, render_report
from gpt2.check.preflight import FAIL, OK
from gpt2.pipeline.params import SCALES, read
from gpt2.pipeline.quantities import show_time
from tests.closure import ROOT
from tests.declared import STAGES
from tests.planned import LAPTOP, SERVER, change

CHECKS = ["parameters", "versions", "GPU", "batch", "CPU", "memory", "disk", "links", "port", "tokenizer", "text"]
VERDICT = re.compile(r"^(NOT READY|READY) for (\w+): .*$", re.MULTILINE)


@pytest.fixture(autouse=True)
def laptop(monkeypatch) -> None:
    """A machine on which the tiny scale can run, whatever this one is; its arithmetic is not timed."""
    monkeypatch.setattr(check, "look", lambda: LAPTOP)
    monkeypatch.setattr(forecast, "product_rate", lambda *_: 4e11)
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A copy of what the command reads, as the working directory."""
    for name in ("params.yaml", "pyproject.toml", "requirements.lock", "dvc.lock", "metrics", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    status = 0
    try:
        main(list(argv))
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def set_value(repository: Path, old: str, new: str) -> None:
    text = (repository / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (repository / "params.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_sound_machine_is_ready(repository, capsys):
    status, told = run(capsys)
    assert status == 0
    assert [line.split()[1] for line in told.splitlines() if line.startswith(("ok ", "warning ", FAIL))] == CHECKS
    assert VERDICT.search(told)[1] == "READY" and FAIL not in told


def test_the_table_has_every_stage_and_the_sum(repository, capsys):
    _, told = run(capsys)
    rows = {line.split("  ")[0] for line in told.splitlines()}
    assert rows >= {"stage", "in all", *(stage for stage in STAGES if stage != "check-params")}
    # What a stage takes is unknown where the recorded run had other parameters.
    seconds = sum(e.seconds or 0 for e in examine(read(), "tiny", LAPTOP).estimates)
    assert show_time(seconds) in next(line for line in told.splitlines() if line.startswith("in all"))
    assert show_time(seconds) in VERDICT.search(told)[0]


def test_one_screen_is_enough(repository, capsys):
    for scale in SCALES:
        lines = run(capsys, "--scale", scale)[1].splitlines()
        assert len(lines) <= 45
        assert max(map(len, lines)) <= 160


def test_a_machine_that_lacks_something_is_not_ready(repository, capsys):
    status, told = run(capsys, "--scale", "full")
    assert status == 1
    assert re.search(r"^FAIL +GPU .*full\.hardware\.nproc=gpu", told, re.MULTILINE)
    assert VERDICT.search(told)[0].startswith("NOT READY for full: GPU")
    assert re.search(r"^train +\S+ (days|years) ", told, re.MULTILINE)


def test_the_scale_in_use_is_the_default(repository, capsys):
    set_value(repository, "scale: tiny", "scale: full")
    assert VERDICT.search(run(capsys)[1])[2] == "full"
    assert VERDICT.search(run(capsys, "--scale", "tiny")[1])[2] == "tiny"


def test_too_little_room_is_told(repository, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10**6)
    status, told = run(capsys)
    assert status == 1
    assert re.search(r"^FAIL +disk +1\.0 MB free, a run adds \d+ MB", told, re.MULTILINE)


def test_a_fault_in_params_is_told_and_ends_the_preflight(repository, capsys):
    set_value(repository, "max_steps: 400", "max_stepz: 400")
    status, told = run(capsys)
    assert status == 1
    assert "tiny.train.max_stepz = 400 is not a known key; did you mean max_steps?" in told
    assert VERDICT.search(told)[0] == "NOT READY for tiny: parameters"
    assert "in all" not in told


def test_a_fault_in_another_scale_is_told_beside_the_forecast(repository, capsys):
    set_value(repository, "max_steps: 95365", "max_stepz: 95365")
    status, told = run(capsys)
    assert status == 1
    assert "full.train.max_stepz" in told and "in all" in told


def test_text_that_is_not_there_is_told_beside_a_forecast_of_the_rest(repository, capsys):
    status, told = run(capsys, "--scale", "short")
    assert status == 1
    assert re.search(r"^FAIL +text .*'data/source' is not a folder.*\n +1 GB of text assumed", told, re.MULTILINE)
    assert "in all" in told


def test_a_folder_that_is_no_repository_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(capsys)[0] == "check: params.yaml does not exist; run from the root of the repository"


def test_an_unknown_scale_is_refused(repository, capsys):
    assert run(capsys, "--scale", "huge")[0] == 2
    set_value(repository, "scale: tiny", "scale: huge")
    assert "scale='huge' must name one of" in run(capsys)[0]


def test_without_a_recorded_run_times_come_from_the_device(repository, capsys):
    (repository / "dvc.lock").unlink()
    status, told = run(capsys)
    assert status == 0
    assert "176 GFLOP/s" in told and "44% of the 400 GFLOP/s just measured for float32 products" in told
    assert "without prepare, benchmark, report" in VERDICT.search(told)[0]


def test_gpus_get_a_column_of_their_own(repository):
    (repository / "data/source").mkdir(parents=True)
    report = examine(change({"prepare.source": "docs", "prepare.packages": ["numpy"]}, "short"), "short", SERVER)
    told = render_report(report)
    assert re.search(r"^stage +time +writes +memory +GPU memory +time from$", told, re.MULTILINE)
    assert "2 × 396 TFLOP/s" in told and "40% of the 989 TFLOP/s of NVIDIA H200" in told


def test_nothing_is_changed_and_no_lock_is_waited_for(repository, capsys):
    (repository / ".dvc/tmp").mkdir()
    lock = zc.lockfile.LockFile(str(repository / ".dvc/tmp/lock"))
    try:
        before = snapshot(repository)
        for scale in SCALES:
            run(capsys, "--scale", scale)
        assert snapshot(repository) == before
    finally:
        lock.close()


def snapshot(folder: Path) -> dict[str, tuple]:
    files = {path: path.stat() for path in folder.rglob("*")}
    return {
        str(path): (stat.st_size, stat.st_mtime_ns, path.read_bytes()) if path.is_file() else ()
        for path, stat in files.items()
    }


@pytest.mark.parametrize("scale", SCALES)
def test_no_connection_is_opened(scale, repository, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert examine(read(), scale, LAPTOP).findings[0].mark == OK


def test_the_command_runs_in_this_repository():
    before = snapshot(ROOT / ".dvc")
    done = subprocess.run([sys.executable, "-m", "gpt2.check"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    verdict = VERDICT.search(done.stdout)
    assert verdict, done.stderr
    assert done.returncode == (verdict[1] == "NOT READY")
    assert snapshot(ROOT / ".dvc") == before
