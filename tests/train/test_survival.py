"""Training killed, out of disk space and orphaned: it ends cleanly, and resumes to the bits of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.closure import ROOT
from tests.train.conftest import resumed_step
from tests.training_run import (
    checkpoint_steps,
    finish,
    outcome,
    prepare_folder,
    scratch_of,
    set_params,
    start,
    wait_for_checkpoint,
)

# 500 windows of the training split in steps of 8: the first epoch ends within step 62.
EPOCH_END = 62


def die(folder: Path, monkeypatch: pytest.MonkeyPatch, at: str, code: Path = ROOT) -> None:
    """Run the training of the checkout `code` until it kills itself at that point."""
    monkeypatch.setenv("DIE_AT", at)
    process = start(folder, module="tests.dying", code=code)
    assert process.wait(timeout=300) == -signal.SIGKILL, (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("at", "resumed"),
    [
        ("save:24", 16),  # half of the third checkpoint
        ("save:8", 0),  # half of the first
        ("evaluate:3", 48),  # the third evaluation, after 50 steps
        (f"step:{EPOCH_END}", 56),  # the step in which one epoch ends and the next begins
        ("step:119", 112),  # the last step
    ],
)
def test_killed_anywhere_the_run_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, resume, at, resumed):
    folder = prepare_folder(tmp_path)
    die(folder, monkeypatch, at)
    assert not (folder / "models").exists() and not (folder / "metrics").exists()
    assert resume(folder) == resumed
    assert outcome(folder) == outcome(whole)
    # The half-written file was removed with the rest of the resume state.
    assert list((folder / ".scratch" / "train").iterdir()) == []


@pytest.mark.parametrize(
    ("edited", "resumes"),
    [("gpt2/train/optim.py", False), ("gpt2/model/gpt.py", False), ("gpt2/prune/repair.py", True)],
)
def test_a_checkpoint_of_edited_training_code_is_not_resumed(tmp_path, monkeypatch, edited, resumes):
    code = tmp_path / "code"
    for name in ("gpt2", "stages", "tests"):
        shutil.copytree(ROOT / name, code / name)
    folder = prepare_folder(tmp_path / "run", train={"max_steps": 40})
    die(folder, monkeypatch, "step:29", code)
    with open(code / edited, "a", encoding="utf-8") as source:
        source.write("# edited\n")
    assert resumed_step(finish(start(folder, code=code), folder)) == (24 if resumes else 0)


def test_muon_resumes_to_the_same_bits_too(tmp_path, monkeypatch, resume):
    settings = {"optimizer": "muon", "max_steps": 40}
    outcomes = []
    for name, at in (("whole", None), ("killed", "step:29")):
        folder = prepare_folder(tmp_path / name, train=settings)
        if at:
            die(folder, monkeypatch, at)
        assert resume(folder) == (24 if at else 0)
        outcomes.append(outcome(folder))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_the_group_of_a_killed_rank(whole_pair, tmp_path, monkeypatch, rank):
    folder = prepare_folder(tmp_path)
    monkeypatch.setenv("DIE_AT", f"step:29:{rank}")
    assert resumed_step(finish(start(folder, processes=2, module="tests.dying", restarts=1), folder)) == 24
    assert outcome(folder) == outcome(whole_pair)


def test_four_processes_resume_to_the_same_bits(tmp_path, monkeypatch):
    # With more than two, the order in which a sum is taken could change.
    outcomes = []
    for name, at in (("whole", "step:999"), ("killed", "step:29:3")):
        folder = prepare_folder(tmp_path / name, train={"max_steps": 40, "micro_batch": 1})
        monkeypatch.setenv("DIE_AT", at)
        finish(start(folder, processes=4, module="tests.dying", restarts=1), folder)
        outcomes.append(outcome(folder))
    assert outcomes[0] == outcomes[1]


# Orphans.


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that torchrun started."""
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "stages" in str(child.cmdline())]


@pytest.fixture
def endless(tmp_path) -> Path:
    """A run too long to end by itself."""
    return prepare_folder(tmp_path, train={"max_steps": 1_000_000})


def test_the_workers_of_a_killed_torchrun_save_and_stop(endless):
    process = start(endless, processes=2)
    wait_for_checkpoint(process, endless)
    workers = workers_of(process)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert_saved_at_its_last_row(endless)


def assert_saved_at_its_last_row(folder: Path) -> None:
    rows = (scratch_of(folder) / "train.csv").read_text().splitlines()
    assert checkpoint_steps(folder)[-1] == int(rows[-1].split(",")[0])
    # It was not started again.
    assert resumed_step((folder / "log.txt").read_text()) == 0


def test_training_stops_when_dvc_is_killed(endless):
    # DVC is the process above the first whose environment names a stage; a shell is between them.
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=3"
    shell = ["/bin/sh", "-c", f"{torchrun} -m stages.train; true"]
    dvc = f"import os, subprocess; subprocess.run({shell!r}, env={{**os.environ, 'DVC_STAGE': 'train'}})"
    env = {key: value for key, value in os.environ.items() if key not in ("DVC_ROOT", "DVC_STAGE")}
    with open(endless / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", dvc],
            cwd=endless,
            env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    wait_for_checkpoint(process, endless)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Torchrun too, and without a second attempt.
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], (endless / "log.txt").read_text()
    assert_saved_at_its_last_row(endless)


@pytest.mark.parametrize(
    ("number", "to_worker"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_a_signal_to_torchrun_or_to_one_worker_stops_all_at_the_same_step_for_good(endless, number, to_worker):
    process = start(endless, processes=2, restarts=3)
    wait_for_checkpoint(process, endless)
    (workers_of(process)[1] if to_worker else process).send_signal(number)
    assert process.wait(timeout=60) != 0
    assert_saved_at_its_last_row(endless)


def test_a_fault_of_the_user_is_reported_once_and_not_tried_again(tmp_path):
    folder = prepare_folder(tmp_path, train={"tokens_per_step": 100})
    process = start(folder, processes=2, restarts=3)
    assert process.wait(timeout=120) != 0
    # Each process may report it before the first one has ended the others.
    assert 1 <= (folder / "log.txt").read_text().count("train: train.tokens_per_step = 100") <= 2


# A full disk.


def test_a_full_disk_ends_the_run_with_a_message_and_room_lets_it_resume(whole, tmp_path, resume):
    folder = prepare_folder(tmp_path)
    script = (
        "import resource; from stages import train; from gpt2.train import checkpoint; save = checkpoint.save_file\n"
        "def limited(tensors, path, metadata):\n"
        "    if 'step_00000024' in str(path): resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))\n"
        "    save(tensors, path, metadata)\n"
        "checkpoint.save_file = limited; train.main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train: ") and "step_00000024.safetensors" in last and "Traceback" not in done.stderr
    assert checkpoint_steps(folder) == [8, 16]
    assert not list(scratch_of(folder).glob(".*tmp"))
    assert resume(folder) == 16
    assert outcome(folder) == outcome(whole)


# Rows.


@pytest.mark.parametrize(("damage", "resumed"), [("gone", 0), ("short", 16)])
def test_damaged_rows_cost_steps_and_nothing_else(whole, tmp_path, monkeypatch, resume, caplog, damage, resumed):
    folder = prepare_folder(tmp_path)
    die(folder, monkeypatch, "step:29")
    rows = scratch_of(folder) / "train.csv"
    if damage == "gone":
        rows.unlink()
    else:
        # Enough for the checkpoint of step 16, not for that of step 24.
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    assert resume(folder) == resumed
    assert "the rows up to step 24 are damaged" in caplog.text
    assert outcome(folder) == outcome(whole)


# The heartbeat.


def status(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpt2.status", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_status_follows_a_run_to_its_end(tmp_path, resume):
    folder = prepare_folder(tmp_path, train={"max_steps": 1_000_000})
    assert status(folder).returncode == 1
    process = start(folder)
    wait_for_checkpoint(process, folder)
    deadline = time.monotonic() + 60
    while '"checkpoint_step": 0' in (scratch_of(folder) / "heartbeat.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    beat = json.loads(status(folder, "--json").stdout)
    assert (beat["pid"], beat["alive"], beat["doing"], beat["max_steps"]) == (process.pid, True, "training", 1_000_000)
    assert 0 < beat["step"] and 0 < beat["checkpoint_step"] <= beat["step"] and beat["tokens_per_s"] > 0
    assert 0 < beat["loss"] < 10 and beat["eta_s"] > 0 and 0 <= beat["data_wait_percent"] < 100
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    text = status(folder).stdout
    assert "stopped before its end" in text and "of 1,000,000" in text and "tokens/s" in text
    shutil.rmtree(scratch_of(folder))
    set_params(folder, train={"max_steps": 12})
    resume(folder)
    assert status(folder).returncode == 1
