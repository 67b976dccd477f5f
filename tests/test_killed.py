"""SIGKILL of a stage at any moment: none of its processes is alive seconds later."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from gpt2.pipeline.files import write_json
from gpt2.replicates.study import MEASURED
from tests.closure import ROOT
from tests.test_end_to_end import SETTINGS
from tests.training_run import prepare_folder

# Five on an idle machine; here other tests may run at the same time.
LIMIT_SECONDS = 25
# A run too long to end by itself.
LONG = 1_000_000
SECTIONS = {
    **SETTINGS,
    "hardware": {**SETTINGS["hardware"], "nproc": 2, "threads": 2, "workers": 2},
    "prepare": {**SETTINGS["prepare"], "source": "docs", "packages": ["torch"]},
    "norm_study": {**SETTINGS["norm_study"], "max_steps": LONG},
    "train": {**SETTINGS["train"], "max_steps": LONG},
    "vocabulary_runs": {**SETTINGS["vocabulary_runs"], "budgets": [1e15]},
}
# `tokenize` keeps small texts to itself.
TOKENIZE = "from gpt2.tokenizer import tokenize; tokenize.PROCESS_BYTES = 1; from stages.tokenize import main; main()"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a corpus, a benchmark, tokens, and metrics of a main model."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "params.yaml").write_text(json.dumps({"norm": "preln", "scale": "tiny", "tiny": SECTIONS}))
    for stage in ("prepare", "benchmark", "tokenize"):
        run = subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment(), text=True,
                             capture_output=True)  # fmt: skip
        assert run.returncode == 0, run.stderr
    for stem in MEASURED:
        write_json(folder / f"metrics/{stem}.json", {})
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def running(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kill_and_count(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    """Wait for its first two processes and then `seconds`; kill it and see that all of its family is gone."""
    family: set[psutil.Process] = set()
    deadline = time.monotonic() + 120
    while len(family) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        family.update(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.02)
    time.sleep(seconds)
    # A short stage may have ended by itself; then its family has to be gone as well.
    with suppress(psutil.NoSuchProcess):
        family.update(psutil.Process(process.pid).children(recursive=True))
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=LIMIT_SECONDS)
    assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []


# While its processes start, and when they work.
@pytest.mark.parametrize("seconds", [0, 4])
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "stages.norm_study"),
        ("-m", "stages.replicates"),
        ("-m", "stages.tokenizer_study"),
        ("-c", TOKENIZE),
        ("-m", "stages.prepare"),
    ],
    ids=["norm-study", "replicates", "tokenizer-study", "tokenize", "prepare"],
)
def test_no_worker_outlives_its_stage(prepared, command, seconds):
    short = command[-1] in (TOKENIZE, "stages.prepare")
    with running(prepared, *command) as process:
        kill_and_count(process, prepared, seconds / 10 if short else seconds)


@pytest.mark.parametrize("seconds", [0, 8])
def test_no_process_outlives_torchrun(tmp_path, seconds):
    # An evaluation after each step over all that there is to evaluate keeps the processes off their look at requests.
    long = {"max_steps": LONG, "eval_interval": 1}
    folder = prepare_folder(tmp_path, hardware={"nproc": 2, "max_restarts": 3}, train=long)
    with running(folder, "-m", "stages.train") as process:
        kill_and_count(process, folder, seconds)
