"""The comparison of two runs of the pipeline, on invented locks and metrics, and a small pipeline really rebuilt."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.pipeline.files import UserError, read_json, write_json, write_text
from tests.declared import STAGES
from tools import verify
from tools.comparison import TEXT_STAGES, digest, list_other_models
from tools.processor import describe_processor, list_differences, read_cpuinfo
from tools.verify import RECORD, Run, judge

HERE = {"architecture": "x86_64", "vendor": "AuthenticAMD", "torch_kernels": "AVX512"}
ELSEWHERE = {"architecture": "x86_64", "vendor": "GenuineIntel", "torch_kernels": "AVX2"}


def invent_entry(stage: str, **outs: str) -> dict:
    return {
        "cmd": f"python -m stages.{stage}",
        "deps": [{"path": f"stages/{stage}.py", "md5": "c0de"}, {"path": "data/tokens", "md5": "1"}],
        "params": {"params.yaml": {f"tiny.{stage}": {"seed": 1}}},
        "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()],
    }


def invent_run() -> Run:
    stages = {
        "tokenize": invent_entry("tokenize", **{"data/tokens": "aa.dir", "metrics/tokens.json": "bb"}),
        "train": invent_entry(
            "train", **{"models/gpt2": "cc.dir", "metrics/train.json": "dd", "metrics/speed/train.json": "ee"}
        ),
        "report": invent_entry("report", **{"report.md": "ff", "plots/report": "gg.dir"}),
    }
    models = {"models": 5, "val_loss_mean": 4.0, "val_loss_sd": 0.02, "heads_mean": 32.0, "heads_sd": 0.0}
    verdicts = {"verdict_learns": "passed", "verdict_repair": "undecided", "claims_passed": 1}
    metrics = {"tokens": {"tokens_train": 1000}, "train": {"val_loss": 4.0}, "replicates": models, "summary": verdicts}
    return Run(stages, metrics)


def set_md5(run: Run, *paths: str) -> None:
    """Let results differ."""
    for out in (out for entry in run.stages.values() for out in entry["outs"] if out["path"] in paths):
        out["md5"] = "other"


@pytest.fixture
def runs() -> tuple[Run, Run]:
    return invent_run(), invent_run()


@pytest.mark.parametrize("processor", [HERE, ELSEWHERE], ids=["same", "another"])
def test_equal_results_pass_on_any_processor_and_measured_times_may_differ(runs, processor):
    set_md5(runs[1], "metrics/speed/train.json", "report.md")
    holds, report = judge(*runs, HERE, processor)
    assert holds and "5 of 5 results are equal bit for bit" in report and "not bit for bit" not in report
    assert report.endswith("PASSED")


@pytest.mark.parametrize("path", ["models/gpt2", "metrics/tokens.json", "plots/report"])
def test_a_differing_result_fails_on_the_same_kind_of_processor(runs, path):
    set_md5(runs[1], path)
    holds, report = judge(*runs, HERE, dict(HERE))
    assert not holds and report.endswith("FAILED") and "only 4 of 5 results" in report
    assert [line.split()[1:] for line in report.splitlines() if "differs" in line] == [[path, "differs"]]


def test_on_another_processor_trained_bits_may_differ_and_that_is_said(runs):
    set_md5(runs[1], "models/gpt2", "metrics/train.json", "plots/report")
    runs[1].metrics["train"]["val_loss"] = 4.07
    runs[1].metrics["replicates"]["val_loss_mean"] = 4.02
    holds, report = judge(*runs, HERE, ELSEWHERE)
    assert holds and "2 of 5 results are equal bit for bit" in report and "reproduced, not bit for bit" in report
    assert "vendor: GenuineIntel (recorded: AuthenticAMD)" in report


def test_on_another_processor_text_must_still_be_equal(runs):
    set_md5(runs[1], "data/tokens")
    holds, report = judge(*runs, HERE, ELSEWHERE)
    assert not holds and "tokenize: data/tokens differs" in report and "PASSED" not in report
    assert set(TEXT_STAGES) < STAGES.keys()


@pytest.mark.parametrize(
    ("name", "key", "value", "fault"),
    [
        ("replicates", "val_loss_mean", 4.08, "val_loss = 4.08 ± 0.02, recorded 4 ± 0.02"),
        ("replicates", "val_loss_mean", float("nan"), "val_loss = nan"),
        ("replicates", "heads_mean", 31.0, "heads = 31 ± 0, recorded 32 ± 0"),
        ("summary", "verdict_learns", "failed", "learns: failed, recorded passed"),
        ("summary", "verdict_learns", "untested", "learns: untested, recorded passed"),
        ("train", "words", 3, "train.words is new"),
        ("train", "val_loss", None, "train.val_loss is missing"),
        # As far as other seeds would be, and a verdict that is open in either run.
        ("replicates", "val_loss_mean", 4.01, None),
        ("train", "val_loss", 4.5, None),
        ("summary", "verdict_learns", "undecided", None),
        ("summary", "verdict_repair", "failed", None),
        ("summary", "claims_passed", 0, None),
    ],
)
def test_on_another_processor_verdicts_and_models_agree_within_their_spread(runs, name, key, value, fault):
    set_md5(runs[1], "metrics/train.json")
    runs[1].metrics[name][key] = value
    if value is None:
        del runs[1].metrics[name][key]
    holds, report = judge(*runs, HERE, ELSEWHERE)
    assert holds == (fault is None) == ("reproduced" in report) and (fault or "") in report


def test_other_models_are_called_different_no_more_often_than_by_chance():
    rng = np.random.default_rng(0)

    def draw() -> dict:
        models = rng.normal(size=(5, 20))
        means, deviations = models.mean(0), models.std(0, ddof=1)
        figures = {f"f{i}_mean": means[i] for i in range(20)} | {f"f{i}_sd": deviations[i] for i in range(20)}
        return {"models": 5, **figures}

    called = sum(bool(list_other_models(draw(), draw())) for _ in range(200))
    assert called <= 20


@pytest.mark.parametrize("processor", [HERE, ELSEWHERE], ids=["same", "another"])
def test_a_missing_stage_fails_on_any_processor(runs, processor):
    recorded, rebuilt = runs
    del rebuilt.stages["report"]
    for pair, verdict in (((recorded, rebuilt), "missing"), ((rebuilt, recorded), "unexpected")):
        holds, report = judge(*pair, HERE, processor)
        assert not holds and verdict in report


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda entry: entry["deps"][0].update(md5="edited"), "stages/train.py"),
        (lambda entry: entry["params"]["params.yaml"]["tiny.train"].update(seed=2), "params.yaml tiny.train"),
        (lambda entry: entry.update(cmd="python -m stages.other"), "cmd"),
    ],
)
def test_a_lock_of_other_sources_fails_even_if_results_are_equal(runs, change, name):
    change(runs[0].stages["train"])
    holds, report = judge(*runs, HERE, HERE)
    assert not holds and f"train: {name} was edited" in report


def test_an_input_that_is_a_result_counts_once_as_that_result(runs):
    runs[1].stages["train"]["deps"][1]["md5"] = "other"
    assert judge(*runs, HERE, HERE)[0]


def test_the_digest_depends_on_results_and_not_on_their_order():
    stages = invent_run().stages
    other = copy.deepcopy(stages)
    other["train"]["outs"].reverse()
    assert digest(other) == digest(dict(reversed(stages.items()))) == digest(stages)
    other["train"]["outs"][-1]["md5"] = "other"
    assert digest(other) != digest(stages)


# --- the processor

X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: EPYC
flags\t\t: fpu avx2 fma rdrand avx512f

processor\t: 1
vendor_id\t: Other
"""
ARM = "processor : 0\nFeatures : fp asimd sve\nCPU implementer : 0x41\nCPU part : 0xd40\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, {"vendor": "AuthenticAMD", "family": "26", "model": "2", "flags": "fpu avx2 fma rdrand avx512f"}),
        (ARM, {"vendor": "0x41", "model": "0xd40", "flags": "fp asimd sve"}),
    ],
)
def test_a_description_names_what_decides_the_bits(tmp_path, text, expected):
    write_text(tmp_path / "cpuinfo", text)
    assert read_cpuinfo(tmp_path / "cpuinfo") == expected
    found = describe_processor(tmp_path / "cpuinfo")
    assert found["instructions"] == ("fma avx2 avx512f" if text is X86 else "asimd sve") and "flags" not in found


def test_a_variable_that_steers_the_libraries_is_another_kind(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = describe_processor()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert list_differences(before, describe_processor()) == ["ATEN_CPU_CAPABILITY: avx2 (recorded: not set)"]
    assert list_differences(before, before) == []


# --- a small pipeline, recorded and rebuilt by DVC itself

TRAIN = """\
import json, os, pathlib, time
for name in ("models", "metrics/speed"):
    pathlib.Path(name).mkdir(parents=True, exist_ok=True)
pathlib.Path("models/gpt2").write_text("weights")
pathlib.Path("metrics/train.json").write_text(json.dumps({"val_loss": 4.0}))
pathlib.Path("metrics/speed/train.json").write_text(json.dumps({"seconds": time.time()}))
"""
DVC_YAML = """\
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    outs: [models/gpt2]
    metrics:
      - metrics/train.json: {cache: false}
      - metrics/speed/train.json: {cache: false}
"""


def run(folder: Path, *command: str) -> None:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
    }
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def commit(folder: Path) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "state")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with a pipeline of one stage, run, recorded and committed."""
    folder = tmp_path_factory.mktemp("verify") / "project"
    write_text(folder / "train.py", TRAIN)
    write_text(folder / "dvc.yaml", DVC_YAML)
    write_text(folder / ".gitignore", "/models/\n")
    run(folder, "git", "init", "--quiet")
    run(folder, sys.executable, "-m", "dvc", "init", "--quiet")
    run(folder, sys.executable, "-m", "dvc", "repro", "--quiet")
    verify.main(["--record"], folder)
    commit(folder)
    return folder


@pytest.fixture
def copied(project, tmp_path) -> Path:
    run(tmp_path, "git", "clone", "--quiet", str(project), "project")
    return tmp_path / "project"


def replace_md5(folder: Path, path: str) -> None:
    """Put another md5 of a result into the lock."""
    md5 = next(out["md5"] for out in verify.read_run(folder).stages["train"]["outs"] if out["path"] == path)
    write_text(folder / "dvc.lock", (folder / "dvc.lock").read_text().replace(md5, "0" * 31 + "f"))


def test_the_committed_state_is_rebuilt_and_equal_whatever_results_were_written_since(copied, capfd):
    write_json(copied / "metrics/train.json", {"val_loss": 7.0})
    write_text(copied / "dvc.lock", (copied / "dvc.lock").read_text() + "# of another machine\n")
    verify.main([], copied)
    printed = capfd.readouterr().out
    assert "2 of 2 results are equal bit for bit" in printed and "PASSED" in printed
    assert "Running stage 'train'" in printed, "results must be computed, not taken from the repository or a cache"


def test_a_result_that_does_not_come_out_again_exits_with_an_error(copied, capfd):
    replace_md5(copied, "models/gpt2")
    commit(copied)
    with pytest.raises(SystemExit, match=r"belongs to another dvc\.lock; run make repro"):
        verify.main([], copied)
    verify.main(["--record"], copied)
    commit(copied)
    with pytest.raises(SystemExit) as stopped:
        verify.main([], copied)
    assert stopped.value.code == 1
    printed = capfd.readouterr().out
    assert "models/gpt2" in printed and "only 1 of 2 results" in printed and "FAILED" in printed


def test_uncommitted_edits_are_refused_by_name(copied):
    write_text(copied / "train.py", TRAIN + "# edited\n")
    with pytest.raises(SystemExit, match=r"train\.py; commit"):
        verify.main([], copied)


def test_the_record_changes_with_the_results_alone(copied):
    write_json(copied / RECORD, {**read_json(copied / RECORD), "processor": ELSEWHERE})
    assert verify.record(copied) is False and read_json(copied / RECORD)["processor"] == ELSEWHERE
    replace_md5(copied, "metrics/speed/train.json")
    assert verify.record(copied) is False
    replace_md5(copied, "models/gpt2")
    assert verify.record(copied) is True and read_json(copied / RECORD)["processor"] == describe_processor()


def test_without_a_lock_or_a_record_the_remedy_is_named(tmp_path):
    with pytest.raises(UserError, match=r"dvc\.lock does not exist; run make repro"):
        verify.read_run(tmp_path)
    with pytest.raises(UserError, match="does not exist; run make repro where the results were made"):
        verify.read_record(tmp_path, {})
