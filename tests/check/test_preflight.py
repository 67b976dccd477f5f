"""Each check of the preflight passes on a sound machine and fails on a faulty one, by what it says."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPT2Config

from gpt2.check import preflight, storage
from gpt2.check.estimate import Estimate
from gpt2.check.machine import Gpu, Machine
from gpt2.check.preflight import (
    FAIL,
    MEMORY_KEYS,
    OK,
    WARNING,
    check_batch,
    check_compiler,
    check_cores,
    check_disk,
    check_gpus,
    check_links,
    check_memory,
    check_parameters,
    check_port,
    check_text,
    check_tokenizer,
    check_versions,
    check_weights,
    free_bytes,
)
from gpt2.check.storage import Demand, Links, disk_demands, find_links, nearest
from gpt2.check.workload import GIB, Need, Workload
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.quantities import show_count, show_rate, show_size, show_time
from gpt2.tokenizer import encodings as tokenizer
from tests.closure import ROOT
from tests.planned import H200, LAPTOP, SERVER, VOLUME, change, plan_of

GB = 10**9


def taking(gib: float = 1.0, gpu_gib: float = 0.0, seconds: float | None = 86400 * 365 * 3) -> list[Estimate]:
    """A forecast in which training takes so much, and the report little."""
    train = Need(0, gib * GIB, flops=1, gpu_memory=gpu_gib * GIB)
    return [Estimate("train", train, seconds, ""), Estimate("report", Need(0, 0.1 * GIB), 1.0, "")]


def server(*gpus: Gpu) -> Machine:
    return replace(SERVER, gpus=gpus)


# Parameters and versions


def test_the_shipped_parameters_pass():
    assert check_parameters(change({})).mark == OK


def test_every_fault_of_the_parameters_is_told():
    values = change({"train.max_steps": 0, "model.n_head": 7})
    values["short"]["train"]["max_stepz"] = 3
    finding = check_parameters(values)
    assert finding.mark == FAIL
    for part in ("tiny.train.max_steps = 0", "n_head=7", "did you mean max_steps?"):
        assert part in finding.text


@pytest.mark.parametrize(
    ("python", "torch", "mark"),
    [
        ("3.11.2", "2.13.0", OK),
        ("3.13.9", "2.13.0+cu130", OK),
        ("3.10.14", "2.13.0", FAIL),
        ("3.14.0", "2.13.0", FAIL),
        ("3.12.1", "2.8.0+cpu", FAIL),
        ("3.12.1", "2.9.1", WARNING),
        ("3.12.1", "2.14.0.dev20260901", WARNING),
    ],
)
def test_versions_are_held_against_project_and_lock(tmp_path, python, torch, mark):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=3.11,<3.14"\ndependencies = ["numpy", "torch>=2.9"]\n'
    )
    (tmp_path / "requirements.lock").write_text("# pins\nnumpy==2.4.6\ntorch==2.13.0\n")
    finding = check_versions(tmp_path, python, torch)
    assert finding.mark == mark
    assert python in finding.text and torch in finding.text
    assert (finding.remedy == "") == (mark == OK)


def test_the_versions_of_this_environment_are_told():
    assert check_versions(ROOT).mark in (OK, WARNING)


# Machine


def test_a_scale_for_the_cpu_needs_no_gpu():
    assert check_gpus(plan_of("tiny"), LAPTOP, taking()).mark == OK


def test_a_process_for_each_gpu_needs_a_gpu():
    finding = check_gpus(plan_of("full"), LAPTOP, taking())
    assert finding.mark == FAIL
    assert "full.hardware.nproc=gpu" in finding.text
    assert "training would take 3.0 years" in finding.remedy


@pytest.mark.parametrize(
    ("precision", "compiled", "told"),
    [("bfloat16", False, "train.precision=bfloat16"), ("float32", True, "train.compile")],
)
def test_settings_meant_for_a_gpu_are_a_warning_without_one(precision, compiled, told):
    plan = plan_of("full", hardware__nproc=1, train__precision=precision, train__compile=compiled)
    finding = check_gpus(plan, LAPTOP, taking(seconds=7200))
    assert finding.mark == WARNING
    assert told in finding.text and "training would take 2.0 h" in finding.text


def test_gpus_with_enough_memory_pass():
    finding = check_gpus(plan_of("full"), SERVER, taking(gpu_gib=40))
    assert finding.mark == OK
    assert finding.text.startswith("2 × NVIDIA H200; 139.0 of 140.0 GiB free, train takes about 40.0")


def test_more_processes_than_gpus_fail():
    finding = check_gpus(plan_of("full", hardware__nproc=4), SERVER, taking(gpu_gib=40))
    assert finding.mark == FAIL
    assert "full.hardware.nproc=4 must not exceed 2" in finding.text


def test_fewer_processes_than_gpus_are_a_warning():
    finding = check_gpus(plan_of("full", hardware__nproc=1), SERVER, taking(gpu_gib=40))
    assert finding.mark == WARNING and "leaves 1 idle" in finding.text


def test_the_smallest_gpu_must_hold_the_model():
    small = replace(H200, name="Small", total=24 * GIB, free=24 * GIB)
    finding = check_gpus(plan_of("full"), server(H200, small), taking(gpu_gib=40))
    assert finding.mark == FAIL
    assert "1 × NVIDIA H200, 1 × Small" in finding.text
    assert finding.remedy == "lower full.train.micro_batch"


def test_memory_of_a_gpu_that_others_hold_is_a_warning():
    finding = check_gpus(plan_of("full"), server(replace(H200, free=10 * GIB)), taking(gpu_gib=40))
    assert finding.mark == WARNING and "10.0 of 140.0 GiB free" in finding.text


def test_unknown_free_memory_of_a_gpu_counts_as_all_of_it():
    assert check_gpus(plan_of("full"), server(replace(H200, free=None)), taking(gpu_gib=40)).mark == OK


@pytest.mark.parametrize(("precision", "mark"), [("bfloat16", WARNING), ("float32", OK)])
def test_a_gpu_before_ampere_has_no_bfloat16(precision, mark):
    volta = replace(H200, capability=(7, 0))
    assert check_gpus(plan_of("full", train__precision=precision), server(volta), taking(gpu_gib=4)).mark == mark


@pytest.mark.parametrize(("device_type", "variable", "name"), [("cuda", "CC", "gcc"), ("cpu", "CXX", "clang++")])
def test_compiling_needs_a_compiler(monkeypatch, device_type, variable, name):
    for either in ("CC", "CXX"):
        monkeypatch.delenv(either, raising=False)
    nothing = check_compiler(device_type, lambda _: None)
    assert nothing.mark == FAIL
    assert name in nothing.text and variable in nothing.remedy
    assert check_compiler(device_type, {name: f"/bin/{name}"}.get).mark == OK
    monkeypatch.setenv(variable, "icx")
    assert check_compiler(device_type, {"icx": "/opt/icx"}.get).text.startswith("/opt/icx")


def test_loaded_weights_are_held_against_the_model(tmp_path):
    GPT2Config(n_layer=24, n_head=16, n_embd=1024).save_pretrained(tmp_path)
    plan = plan_of("full", train__init_from=str(tmp_path))
    finding = check_weights(plan)
    assert finding.mark == FAIL
    assert "-S full.model.n_layer=24 -S full.model.n_head=16 -S full.model.n_embd=1024" in finding.text
    assert check_weights(plan_of("full", train__init_from="openai-community/gpt2")).mark == OK
    # No step is taken, so none has to divide.
    assert check_batch(plan, 7).mark == OK
    workload = Workload(plan, VOLUME, SERVER)
    assert (workload.steps, workload.scratch_bytes) == (0, 0)


def test_a_step_divides_among_the_processes():
    finding = check_batch(plan_of("full"), 8)
    assert finding.mark == OK
    assert "524,288 tokens a step = 8 × 1 × 64 × 1024" in finding.text


@pytest.mark.parametrize(("processes", "nnodes"), [(3, 1), (2, 3)])
def test_a_step_that_does_not_divide_fails_with_the_nearest_that_do(processes, nnodes):
    finding = check_batch(plan_of("full", hardware__nnodes=nnodes, hardware__rdzv_endpoint="a:1"), processes)
    assert finding.mark == FAIL
    assert finding.text.startswith("full.train.tokens_per_step = 524288 must be a multiple of")


@pytest.mark.parametrize(
    ("threads", "workers", "mark", "over"), [(2, 2, OK, ""), (3, 1, WARNING, "threads"), (1, 3, WARNING, "workers")]
)
def test_threads_and_workers_have_cores(threads, workers, mark, over):
    finding = check_cores(plan_of(hardware__threads=threads, hardware__workers=workers), LAPTOP)
    assert finding.mark == mark
    assert f"tiny.hardware.{over}" in finding.remedy or mark == OK


@pytest.mark.parametrize(("gib", "mark"), [(11.9, OK), (12.1, WARNING), (16.1, FAIL)])
def test_the_stage_that_takes_most_memory_must_fit(gib, mark):
    finding = check_memory(plan_of(), LAPTOP, taking(gib))
    assert finding.mark == mark
    assert f"train takes about {gib}" in finding.text
    assert (finding.remedy == "lower tiny.train.micro_batch") == (mark == FAIL)


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_a_remedy_against_too_little_memory_exists_for_every_stage_that_can_take_most(machine):
    needs = Workload(plan_of("full"), VOLUME, machine).needs()
    assert needs.keys() - MEMORY_KEYS.keys() == {"benchmark", "report"}
    for stage in ("benchmark", "report"):
        assert needs[stage].memory < max(need.memory for need in needs.values())


# Disk


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    return tmp_path


def test_a_disk_with_room_passes(tmp_path):
    demands = [Demand("workspace", tmp_path, 20 * GB), Demand("DVC cache", tmp_path / "not/yet/there", 30 * GB)]
    (finding,) = check_disk(demands, lambda _: 60 * GB)
    assert finding.mark == OK
    assert finding.text == "60.0 GB free, a run adds 50.0 GB (workspace 20.0 GB, DVC cache 30.0 GB)"


@pytest.mark.parametrize(("free", "mark"), [(56 * GB, OK), (55 * GB, WARNING), (50 * GB, WARNING), (49 * GB, FAIL)])
def test_places_of_one_disk_share_its_room(tmp_path, free, mark):
    demands = [Demand("workspace", tmp_path, 20 * GB), Demand("DVC cache", tmp_path, 30 * GB)]
    (finding,) = check_disk(demands, lambda _: free)
    assert finding.mark == mark
    assert (finding.remedy == "") == (mark == OK)


def test_disks_are_held_against_their_own_demands(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "device", lambda path: path.name)
    demands = [Demand(name, tmp_path / name, 10 * GB) for name in ("here", "there")]
    free = {tmp_path / "here": 100 * GB, tmp_path / "there": 5 * GB}
    for path in free:
        path.mkdir()
    assert [finding.mark for finding in check_disk(demands, free.get)] == [OK, FAIL]


def test_free_room_of_a_real_disk_is_told(tmp_path):
    assert free_bytes(tmp_path) > 0


def demand(workload: Workload, links: Links, root: Path) -> dict[str, float]:
    return {demand.name: demand.n_bytes for demand in disk_demands(workload, links, root)}


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch) -> Path:
    """No cache of this machine counts."""
    monkeypatch.setattr(storage, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_the_hub_will_send_needs_room_in_its_cache(repository, hub_cache):
    links = Links(repository, ("copy",), ())
    assert "hub cache" not in demand(Workload(plan_of(), VOLUME, LAPTOP), links, repository)
    workload = Workload(plan_of("full"), VOLUME, LAPTOP)
    before = demand(workload, links, repository)["hub cache"]
    assert before == pytest.approx(0.63 * VOLUME.n_bytes)
    blobs = hub_cache / "datasets--HuggingFaceFW--fineweb-edu/blobs"
    blobs.mkdir(parents=True)
    (blobs / "some").write_bytes(bytes(5000))
    assert demand(workload, links, repository)["hub cache"] == pytest.approx(before - 5000)


def test_copies_take_their_room_twice_and_links_once(repository):
    workload = Workload(plan_of("full"), VOLUME, LAPTOP)
    outs = sum(need.written for need in workload.needs().values())
    copied = demand(workload, Links(repository, ("copy",), ()), repository)
    linked = demand(workload, Links(repository, ("hardlink",), ("hardlink",)), repository)
    hub = {"hub cache": workload.download_bytes}
    assert copied == {**hub, "workspace": outs, "DVC cache": outs, "checkpoints": workload.scratch_bytes}
    assert linked == {**copied, "workspace": 0}


def test_what_lies_there_already_is_not_asked_again(repository):
    workload = Workload(plan_of(), VOLUME, LAPTOP)
    copying = Links(repository, ("copy",), ())
    before = demand(workload, copying, repository)
    for path, size in (("data/tokens/a.bin", 3000), ("models/gpt2/b", 200), (".scratch/train/x/c", 70)):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_bytes(bytes(size))
    after = demand(workload, copying, repository)
    assert {name: before[name] - after[name] for name in before} == {
        "workspace": pytest.approx(3200),
        "DVC cache": pytest.approx(3200),
        "checkpoints": pytest.approx(70),
    }


def test_more_than_enough_there_frees_nothing_elsewhere(repository):
    workload = Workload(plan_of(), VOLUME, LAPTOP)
    before = demand(workload, Links(repository, ("copy",), ()), repository)["workspace"]
    (repository / "data/corpus").mkdir(parents=True)
    with open(repository / "data/corpus/a", "wb") as sparse:
        sparse.truncate(10**12)
    after = demand(workload, Links(repository, ("copy",), ()), repository)["workspace"]
    assert after == pytest.approx(before - workload.needs()["prepare"].written)


def test_links_are_found_by_trying_and_leave_nothing(repository):
    links = find_links(repository)
    assert links.configured == ("reflink", "copy")
    # Every file system that Python's own tests run on has these two.
    assert {"hardlink", "symlink"} <= set(links.works)
    assert links.cache == repository / ".dvc/cache" and not links.cache.exists()
    assert sorted(path.name for path in repository.rglob("*")) == [".dvc", "config"]


def test_the_configured_cache_and_types_are_read(repository):
    (repository / ".dvc/config.local").write_text("[cache]\n    dir = ../store\n    type = hardlink,symlink\n")
    links = find_links(repository)
    assert Path(links.cache) == repository / "store"
    assert links.used == "hardlink"


@pytest.mark.parametrize(
    ("configured", "works", "mark", "told"),
    [
        (("reflink", "copy"), ("reflink",), OK, "reflink: each out is stored once"),
        (("reflink", "copy"), ("hardlink", "symlink"), OK, "copy: each out is stored twice, 1.5 GB more"),
        (("symlink",), ("hardlink", "symlink"), OK, "symlink: each out is stored once"),
        (("reflink",), ("hardlink",), FAIL, "none in common"),
    ],
)
def test_how_outs_are_stored_is_told(configured, works, mark, told):
    finding = check_links(Links(ROOT, configured, works), 1.5 * GB)
    assert finding.mark == mark
    assert told in finding.text and "cache.type=" + ",".join(configured) in finding.text


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(preflight.UserError, match=r"\.dvc does not exist; run from the root of the repository"):
        find_links(tmp_path)


def test_a_broken_configuration_is_named(repository):
    (repository / ".dvc/config").write_text("[cache\n")
    with pytest.raises(preflight.UserError, match=r"\.dvc/config cannot be read"):
        find_links(repository)


def test_a_place_that_cannot_be_written_is_named(repository, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(repository))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(preflight.UserError, match=r"cannot be written \(Permission denied\); make it writable"):
        find_links(repository)


def test_the_nearest_folder_is_the_first_that_exists(tmp_path):
    assert nearest(tmp_path / "a/b/c") == nearest(tmp_path) == tmp_path


# Ports


def hardware(**changes) -> HardwareConfig:
    return plan_of(**{f"hardware__{key}": value for key, value in changes.items()}).hardware


def meeting_at(endpoint: str) -> HardwareConfig:
    return hardware(nnodes=2, rdzv_endpoint=endpoint, local_addr="127.0.0.1")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_one_machine_takes_any_port():
    finding = check_port(hardware(local_addr="127.0.0.1"))
    assert finding.mark == OK and "localhost gives free ports" in finding.text


def test_a_machine_that_may_not_listen_fails(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    finding = check_port(hardware(local_addr="127.0.0.1"))
    assert finding.mark == FAIL and "Operation not permitted" in finding.text


def test_a_machine_whose_name_has_no_address_fails(monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda: "name.invalid")

    def unknown(host, *args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = check_port(hardware())
    assert finding.mark == FAIL and "name.invalid" in finding.text and "hardware.local_addr" in finding.remedy


def test_a_free_meeting_point_on_this_machine_passes():
    # A port that was just given back.
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    finding = check_port(meeting_at(f"127.0.0.1:{free_port}"))
    assert finding.mark == OK and "on this machine and free" in finding.text


def test_a_busy_meeting_point_on_this_machine_fails(busy_port):
    finding = check_port(meeting_at(f"127.0.0.1:{busy_port}"))
    assert finding.mark == FAIL
    assert f"hardware.rdzv_endpoint=127.0.0.1:{busy_port} is on this machine and in use" in finding.text


def test_a_meeting_point_of_no_known_host_fails(monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        if host == "nowhere.invalid":
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    finding = check_port(meeting_at("nowhere.invalid:29400"))
    assert finding.mark == FAIL and "nowhere.invalid has no address" in finding.text


@pytest.mark.parametrize(
    ("answer", "mark", "told"),
    [
        (None, OK, "192.0.2.1 waits there"),
        (ConnectionRefusedError(111, "Connection refused"), WARNING, "nobody waits at port 29400 yet"),
        (TimeoutError("timed out"), FAIL, "cannot be reached from here"),
        (OSError(113, "No route to host"), FAIL, "cannot be reached from here (No route to host)"),
    ],
)
def test_a_meeting_point_elsewhere_is_asked(monkeypatch, answer, mark, told):
    class Connection:
        def close(self) -> None:
            pass

    def connect(address, timeout):
        assert address == ("192.0.2.1", 29400) and timeout <= 5
        if answer:
            raise answer
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    # An address for documentation, which no machine has.
    finding = check_port(meeting_at("192.0.2.1:29400"))
    assert finding.mark == mark and told in finding.text


# Tokenizer and text


@pytest.fixture
def fresh_encoding(monkeypatch) -> None:
    """Encodings are loaded from their files, whatever was loaded before."""
    monkeypatch.setattr(preflight, "load_encoding", tokenizer.load_encoding.__wrapped__)


def test_the_files_of_the_tokenizer_are_told_by_their_digests():
    finding = check_tokenizer("gpt2")
    assert finding.mark == OK
    for part in ("50,257", "vocab.bpe 1ce16647…", "encoder.json 19613966…"):
        assert part in finding.text


def test_an_absent_file_of_the_tokenizer_fails(fresh_encoding, monkeypatch):
    monkeypatch.setattr(tokenizer, "VOCABULARY_PACKAGE", "no_such_package")
    finding = check_tokenizer("gpt2")
    assert finding.mark == FAIL and "ships vocab.bpe, is not installed" in finding.text


def test_a_damaged_file_of_the_tokenizer_fails(fresh_encoding, monkeypatch, tmp_path):
    (tmp_path / "damaged_vocabulary/data").mkdir(parents=True)
    (tmp_path / "damaged_vocabulary/__init__.py").touch()
    (tmp_path / "damaged_vocabulary/data/vocab.bpe").write_text("#version: 0.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tokenizer, "VOCABULARY_PACKAGE", "damaged_vocabulary")
    finding = check_tokenizer("gpt2")
    assert finding.mark == FAIL and "GPT-2's has 1ce16647…" in finding.text


def test_enough_text_passes_with_the_epochs_it_makes():
    finding = check_text(plan_of(train__max_steps=4000), VOLUME, 4000)
    assert finding.mark == OK
    # 4000 x 2048 tokens of 98 % of 4 million
    assert "4,000 steps read the training split 2.1 times" in finding.text


@pytest.mark.parametrize(
    "key",
    [
        *("train.eval_tokens", "heads.n_tokens", "prune.scoring_tokens", "prune.greedy_tokens", "prune.eval_tokens"),
        "norm_study.eval_tokens",
    ],
)
def test_a_split_with_fewer_tokens_than_a_stage_reads_fails(key):
    # Of 4 million tokens 1 % are held out for each of two splits.
    assert check_text(plan_of(**{key.replace(".", "__"): 39_000}), VOLUME, 1).mark == OK
    finding = check_text(plan_of(**{key.replace(".", "__"): 41_000}), VOLUME, 1)
    assert finding.mark == FAIL
    assert f"tiny.{key}=41,000 of 40,000" in finding.text


def test_a_training_split_with_fewer_tokens_than_the_repairs_read_fails():
    finding = check_text(plan_of(prune__calibration_tokens=3_930_000), VOLUME, 1)
    assert finding.mark == FAIL
    assert "tiny.prune.calibration_tokens=3,930,000 of 3" in finding.text


# Words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "< 0.1 s"),
        (0.31, "0.3 s"),
        (74, "74 s"),
        (130, "2.2 min"),
        (3600 * 46, "46 h"),
        (86400 * 10, "10 days"),
        (1e9, "32 years"),
    ],
)
def test_a_duration_in_words(seconds, text):
    assert show_time(seconds) == text


def test_quantities_in_words():
    assert show_time(None) == "unknown"
    assert [show_size(n) for n in (500, 4e5, 2.5e7, 4.17e10, 1.2e12)] == [
        *("0.5 kB", "400 kB", "25.0 MB", "41.7 GB", "1.2 TB")
    ]
    assert [show_count(n) for n in (40, 3.95e6, 1e10)] == ["40", "4.0 million", "10.0 billion"]
    assert [show_rate(n) for n in (1.86e11, 3.956e14)] == ["186 GFLOP/s", "396 TFLOP/s"]


def test_the_compiler_is_looked_for_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert check_compiler("cuda").mark == FAIL
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "gcc", 0o755)
    assert check_compiler("cuda").mark == OK
