"""Each check of the preflight passes where a run can start, and fails by naming key, value and remedy where not."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zc.lockfile
from transformers import GPT2Config

from gpt2.check import __main__ as command
from gpt2.check import estimate, preflight
from gpt2.check.preflight import (
    GIB,
    WARNING,
    check_compiler,
    check_disk,
    check_gpus,
    check_memory,
    check_port,
    check_time,
    check_tokenizer,
    check_training,
    check_versions,
    estimate_tokens,
)
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import SCALES
from gpt2.tokenizer import encodings
from tests.check.changed import change, plan_of
from tests.closure import ROOT

DISK_BYTES = 10**12


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch) -> Path:
    """A folder without data, with the files that the checks read."""
    for name in ("params.yaml", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def see_gpus(monkeypatch: pytest.MonkeyPatch, *gib: int) -> None:
    """Let torch find GPUs of these sizes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gib))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gib))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=gib[i] * GIB))


@pytest.mark.parametrize(
    ("python", "installed", "verdict"),
    [
        ("3.11.2", "2.13.0", "ok"),
        ("3.13.9", "2.13.0+cu130", "ok"),
        ("3.10.14", "2.13.0", "fails"),
        ("3.14.0", "2.13.0", "fails"),
        ("3.12.1", "2.8.0+cpu", "fails"),
        ("3.12.1", "2.9.1", "warns"),
        ("3.12.1", "2.14.0.dev20260901", "warns"),
    ],
)
def test_versions_are_compared_with_project_and_lock(python, installed, verdict):
    if verdict == "fails":
        with pytest.raises(UserError, match=python):
            check_versions(python, installed)
    else:
        assert check_versions(python, installed).startswith(WARNING) == (verdict == "warns")


@pytest.mark.parametrize(
    ("gpus", "changes", "verdict"),
    [
        ([], {"scale": "tiny"}, "none needed"),
        ([], {"scale": "full"}, "full.hardware.nproc=gpu"),
        ([], {"scale": "full", "hardware__nproc": 1}, "warning: none; train.precision=bfloat16"),
        ([80, 80], {"scale": "full"}, "2 × H100"),
        ([80, 80], {"scale": "full", "hardware__nproc": 1}, "warning: 2 × H100; full.hardware.nproc=1"),
        ([80, 80], {"scale": "full", "hardware__nproc": 4}, "full.hardware.nproc=4 must not exceed the 2"),
    ],
)
def test_gpus_are_compared_with_processes_and_settings(monkeypatch, gpus, changes, verdict):
    see_gpus(monkeypatch, *gpus)
    try:
        found = check_gpus(plan_of(**changes))
    except UserError as error:
        found = str(error)
    assert verdict in found


def test_the_smallest_gpu_must_hold_the_training(monkeypatch):
    plan = plan_of("full")
    see_gpus(monkeypatch, 80, 80)
    assert f"{plan.training_memory / GIB:.1f} of 80.0 GiB" in check_memory(plan)
    see_gpus(monkeypatch, 80, 16)
    with pytest.raises(UserError, match=r"full\.train\.micro_batch=64"):
        check_memory(plan)
    assert plan_of("full", train__micro_batch=8).training_memory < plan.training_memory


def test_memory_of_training_is_that_of_gpt2_as_measured():
    # 20.5 GiB at 64 windows of 1,024 tokens was measured in pure bfloat16; mixed precision keeps fp32 sums besides.
    assert 20 * GIB < plan_of("full", train__micro_batch=64).training_memory < 40 * GIB


@pytest.mark.parametrize(("kind", "variable", "name"), [("gpu", "CC", "gcc"), ("cpu", "CXX", "clang++")])
def test_compiling_needs_a_compiler(monkeypatch, repository, kind, variable, name):
    see_gpus(monkeypatch, *([80] if kind == "gpu" else []))
    plan = plan_of("short" if kind == "gpu" else "tiny", train__compile=True)
    for either in ("CC", "CXX"):
        monkeypatch.delenv(either, raising=False)
    monkeypatch.setenv("PATH", str(repository))
    with pytest.raises(UserError, match=f"{name}.*name it in {variable}"):
        check_compiler(plan)
    for compiler in (name, "icx"):
        (repository / compiler).write_text("#!/bin/sh\n")
        (repository / compiler).chmod(0o755)
    assert check_compiler(plan) == str(repository / name)
    monkeypatch.setenv(variable, "icx")
    assert check_compiler(plan) == str(repository / "icx")


def test_a_step_divides_among_the_processes(monkeypatch):
    see_gpus(monkeypatch, *[80] * 8)
    assert "524,288 tokens a step = 8 × 1 × 64 × 1024" in check_training(plan_of("full"))
    see_gpus(monkeypatch, *[80] * 3)
    with pytest.raises(UserError, match=r"train\.tokens_per_step = 524288 must be a multiple of"):
        check_training(plan_of("full"))


def test_loaded_weights_are_compared_with_the_model(tmp_path):
    GPT2Config(n_layer=24, n_head=16, n_embd=1024).save_pretrained(tmp_path / "medium")
    with pytest.raises(UserError, match=r"full\.model\.n_layer=24.*full\.model\.n_embd=1024"):
        check_training(plan_of("full", train__init_from=str(tmp_path / "medium")))
    GPT2Config().save_pretrained(tmp_path / "small")
    assert "no step" in check_training(plan_of("full", train__init_from=str(tmp_path / "small")))


@pytest.fixture
def fresh_encoding() -> Iterator[None]:
    """Let the vocabulary files be read again, here and in the tests that follow."""
    encodings.load_encoding.cache_clear()
    yield
    encodings.load_encoding.cache_clear()


def test_a_vocabulary_file_that_is_absent_or_damaged_is_named(fresh_encoding, tmp_path, monkeypatch):
    assert "50,257 tokens" in check_tokenizer(plan_of("full"))
    assert "trains 512 tokens" in check_tokenizer(plan_of(tokenize__encoding="bpe_512"))
    encodings.load_encoding.cache_clear()
    monkeypatch.setattr(encodings, "VOCABULARY_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"no_such_package, which ships vocab\.bpe"):
        check_tokenizer(plan_of("full"))
    (tmp_path / "damaged_vocabulary/data").mkdir(parents=True)
    (tmp_path / "damaged_vocabulary/__init__.py").touch()
    (tmp_path / "damaged_vocabulary/data/vocab.bpe").write_text("#version: 0.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encodings, "VOCABULARY_PACKAGE", "damaged_vocabulary")
    with pytest.raises(UserError, match=r"vocab\.bpe.*1ce16647"):
        check_tokenizer(plan_of("full"))


def test_the_disk_must_hold_tokens_weights_and_checkpoints(monkeypatch):
    plan = plan_of("full", prepare__max_bytes=4 * 10**9)
    assert estimate_tokens(plan)[0] == 10**9
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_BYTES))
    found = check_disk(plan)
    # Three states of weights and two moments, in fp32, and twice the weights.
    assert "checkpoints 5.5 GB" in found and "prepare.max_bytes" in found
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match=r"1\.0 GB free.*make room"):
        check_disk(plan)


def test_links_that_this_disk_lacks_are_refused(repository):
    (repository / ".dvc/config").write_text("[cache]\n    type = reflink\n")
    plan = plan_of()
    if "reflink" in check_disk_or_error(plan).partition("this disk has")[2].partition(":")[0]:
        pytest.skip("this file system has reflinks")
    with pytest.raises(UserError, match=r"cache\.type=reflink.*none in common"):
        check_disk(plan)
    assert not list(repository.glob(".check_*"))


def check_disk_or_error(plan: estimate.Plan) -> str:
    try:
        return check_disk(plan)
    except UserError as error:
        return str(error)


def test_a_text_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"short\.prepare\.path = 'nowhere'"):
        estimate_tokens(plan_of("short", prepare__path="nowhere"))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_meeting_place_must_be_free_or_reachable(taken):
    assert "free" in check_port(plan_of())
    with pytest.raises(UserError, match=rf"tiny\.hardware\.rdzv_endpoint=127\.0\.0\.1:{taken}"):
        check_port(plan_of(hardware__nnodes=2, hardware__rdzv_endpoint=f"127.0.0.1:{taken}"))
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid has no address"):
        check_port(plan_of(hardware__nnodes=2, hardware__rdzv_endpoint="no.such.host.invalid:29500"))


def test_time_is_measured_by_real_steps_and_scales_with_their_number():
    small = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 16,
             "train__tokens_per_step": 64, "train__micro_batch": 2, "tokenize__encoding": "bpe_300"}  # fmt: skip
    text = check_time(plan_of(**small))
    assert "training takes about" in text and "measured now in" in text
    plan = plan_of(**small)
    assert f"{plan.train.max_steps * 64:,} tokens" in text


def test_a_length_in_epochs_is_that_of_the_training_split(monkeypatch):
    monkeypatch.setattr(preflight, "training_rate", lambda _: (1000.0, "invented"))
    epochs = {"train__max_steps": None, "train__epochs": 2.0}
    assert check_time(plan_of(**epochs)).startswith("unknown")
    # Two epochs of 98 % of a million tokens.
    assert "33 min: 1,960,000 tokens" in check_time(plan_of(**epochs, prepare__max_bytes=4_000_000))


def test_a_rate_of_a_comparable_run_here_is_used(monkeypatch):
    plan = plan_of()
    block = plan.block | {"norm": "preln"}
    monkeypatch.setattr(estimate, "recorded_params", lambda stage: block)
    monkeypatch.setattr(estimate.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    estimate.RECORDED.parent.mkdir(parents=True)
    estimate.RECORDED.write_text('{"processes": 2, "tokens_per_s": 1234.5}')
    assert estimate.training_rate(plan)[0] == 1234.5
    # It says nothing of another model or another number of processes, nor if Git's commit brought it.
    monkeypatch.setattr(estimate, "_measure_rate", lambda _: (7.0, 1))
    assert estimate.training_rate(plan_of(model__n_layer=2))[0] == 7.0
    assert estimate.training_rate(plan_of(hardware__nproc=1))[0] == 7.0
    monkeypatch.setattr(estimate.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert estimate.training_rate(plan)[0] == 7.0


def test_all_faults_are_reported_at_once_and_the_command_fails(monkeypatch, capsys, repository):
    monkeypatch.setattr(command, "read", lambda: change("tiny", {"train.micro_batch": 7, "hardware.nproc": 3}))
    with pytest.raises(SystemExit) as ended:
        command.main(["--scale", "tiny"])
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert "NOT READY for tiny: " in printed and "training" in printed
    assert len(printed.splitlines()) <= 24


def test_the_shipped_tiny_scale_is_ready(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_measure_rate", lambda _: (1000.0, 20))
    command.main([])
    assert capsys.readouterr().out.rstrip().endswith("READY for tiny")


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_is_changed_no_lock_is_waited_for_and_no_connection_opened(scale, repository, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(estimate, "_measure_rate", lambda _: (1000.0, 20))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (repository / ".dvc/tmp").mkdir()
    lock = zc.lockfile.LockFile(str(repository / ".dvc/tmp/lock"))
    try:
        before = {path: path.stat().st_mtime_ns for path in repository.rglob("*") if path.is_file()}
        assert command.examine(change(scale, {}), scale)[0][0] == "ok"
        assert {path: path.stat().st_mtime_ns for path in repository.rglob("*") if path.is_file()} == before
    finally:
        lock.close()
