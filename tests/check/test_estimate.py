"""The forecast: sizes by arithmetic, times in proportion to a recorded run or from operations and a device's rate."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from gpt2.check import corpus_size as volume
from gpt2.check import estimate as forecast
from gpt2.check import machine
from gpt2.check.corpus_size import PROSE_BYTES_PER_TOKEN, PROSE_DOCUMENT_BYTES, Volume, estimate_volume
from gpt2.check.estimate import ENCODE_RATE, READ_RATE, WRITE_RATE, Estimate, Rate, Record, device_rate, estimate_stages
from gpt2.check.machine import Gpu, Machine, look, product_rate
from gpt2.check.workload import TEXT_PROCESS, VOCAB_SIZE, Need, Plan, Workload, count_parameters, forward_flops
from gpt2.model.config import GPTConfig
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.model.weights import save_model
from gpt2.pipeline.files import UserError, write_json
from gpt2.pipeline.params import read
from gpt2.tokenizer.encodings import load_encoding
from gpt2.train.checkpoint import KEPT
from gpt2.train.results import PEAK_FLOPS
from tests.closure import ROOT
from tests.declared import STAGES
from tests.planned import H200, LAPTOP, SERVER, VOLUME, change, plan_of

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 100}


def needs_of(plan: Plan, machine: Machine = LAPTOP, text: Volume = VOLUME) -> dict[str, Need]:
    return Workload(plan, text, machine).needs()


def never() -> Rate:
    raise AssertionError("the rate of the device was asked")


def by_stage(estimates: list[Estimate]) -> dict[str, Estimate]:
    return {estimate.stage: estimate for estimate in estimates}


# Work, bytes and memory


def test_the_forecast_has_every_stage_that_works_in_the_order_of_the_pipeline():
    assert list(needs_of(plan_of())) == [stage for stage in STAGES if stage != "check-params"]


def test_the_vocabulary_is_that_of_the_encoding():
    assert load_encoding().n_vocab == VOCAB_SIZE


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
def test_parameters_are_counted_as_the_model_has_them(norm):
    config = GPTConfig(**SMALL, norm=norm)
    assert count_parameters(config) == GPT(config).n_params()


def test_gpt2_has_its_parameters():
    assert count_parameters(plan_of("full").model) == 124_439_808


def test_operations_of_a_forward_pass_by_hand():
    config = GPTConfig(**SMALL, norm="preln")
    # Blocks: 2 x 12 L C^2 + 4 L C T = 3072 + 1024 a token; classifier: 2 V C = 1600 a prediction.
    assert forward_flops(config, 10, 3) == 10 * 4096 + 3 * 1600
    assert forward_flops(config, 10) == pytest.approx(10 * training_flops_per_token(config, config.vocab_size) / 3)


def test_operations_of_training_by_hand():
    plan = plan_of(train__max_steps=250, train__eval_interval=100, train__eval_tokens=16384, benchmark__items=100)
    model = plan.model
    # 6 (12 L C^2 + V C) + 12 L C T for L 4, C 128, T 128, V 50257
    assert training_flops_per_token(model, model.vocab_size) == 6 * (12 * 4 * 128**2 + 50257 * 128) + 12 * 4 * 128 * 128
    steps = 250 * 2048 * training_flops_per_token(model, model.vocab_size)
    # Before steps 0, 100 and 200, and after the last; 400 rows of 24 words of 7 bytes and 3 bytes a token, 8 of them
    # to be predicted.
    rows = forward_flops(model, 400 * 24 * 7 / 3, 400 * 8 * 7 / 3)
    assert needs_of(plan)["train"].flops == pytest.approx(steps + 4 * (forward_flops(model, 16384) + rows))


def test_a_longer_run_is_more_work_in_proportion():
    once, twice = (needs_of(plan_of(train__max_steps=n * 100_000))["train"] for n in (1, 2))
    assert twice.flops / once.flops == pytest.approx(2, rel=1e-4)
    assert twice.memory == once.memory


def test_evaluation_is_part_of_training():
    rare, often = (needs_of(plan_of(train__eval_interval=n))["train"].flops for n in (200, 1))
    assert often > 3 * rare


def test_tokens_take_two_bytes_each():
    few, many = (needs_of(plan_of(), text=replace(VOLUME, n_bytes=n))["tokenize"].written for n in (3e9, 6e9))
    assert many - few == pytest.approx(2 * 1e9)


def test_a_model_takes_the_bytes_that_it_has_on_the_disk(tmp_path):
    plan = plan_of(model__n_layer=1, model__n_embd=16, model__n_head=2)
    save_model(GPT(plan.model), tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert needs_of(plan)["prune"].written == pytest.approx(size, rel=0.01)


def test_scratch_holds_the_kept_checkpoints_and_the_next_of_weights_and_two_moments():
    workload = Workload(plan_of("full"), VOLUME, LAPTOP)
    assert workload.checkpoint_bytes == 3 * 4 * 124_439_808
    # Beside them, twice, the weights that were evaluated last.
    assert workload.scratch_bytes == (KEPT + 1) * workload.checkpoint_bytes + 2 * 4 * 124_439_808


def test_a_length_in_epochs_is_steps_of_the_text_that_trains():
    plan = plan_of(train__max_steps=None, train__epochs=0.5, train__warmup_steps=1)
    kept = 1 - (plan.prepare.val_percent + plan.prepare.test_percent) / 100
    assert Workload(plan, VOLUME, LAPTOP).steps == round(0.5 * kept * VOLUME.tokens / plan.train.tokens_per_step)


def test_sizes_are_those_of_the_committed_run():
    lock = YAML(typ="safe", pure=True).load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    scale = next(key for key in lock["prepare"]["params"]["params.yaml"]).split(".")[0]
    values = read(ROOT / "params.yaml")
    plan = plan_of(scale)
    needs = needs_of(plan, text=Record(values, ROOT).volume(plan))
    for stage, path in {"prepare": "data/corpus", "tokenize": "data/tokens", "train": "models/gpt2"}.items():
        size = next(out["size"] for out in lock[stage]["outs"] if out["path"] == path)
        assert needs[stage].written == pytest.approx(size, rel=0.1), stage


def test_gpus_take_the_models_and_share_the_training():
    on_cpu, on_gpu = needs_of(plan_of("full"), LAPTOP)["train"], needs_of(plan_of("full"), SERVER)["train"]
    assert (on_cpu.parallel, on_gpu.parallel) == (1, 2)
    assert on_cpu.gpu_memory == 0 < on_gpu.gpu_memory
    assert on_gpu.flops == on_cpu.flops


def test_machines_that_train_together_share_the_work():
    plan = plan_of("full", hardware__nnodes=3, hardware__rdzv_endpoint="a:1")
    assert needs_of(plan, SERVER)["train"].parallel == 6


def test_memory_grows_with_the_micro_batch_and_the_processes():
    small, large = (needs_of(plan_of(train__micro_batch=n))["train"].memory for n in (1, 8))
    assert small < large
    one, two = (needs_of(plan_of(hardware__nproc=n))["train"].memory for n in (1, 2))
    assert two == 2 * one


# Text


def prepare_config(**changes):
    return plan_of("short", **{f"prepare__{key}": value for key, value in changes.items()}).prepare


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file of each kind, 3 documents of 1000 bytes in each; random letters, so that nothing is packed away."""
    letters = torch.randint(97, 123, (3, 1000), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = [bytes(row.tolist()).decode() for row in letters]
    pq.write_table(pa.table({"text": texts, "id": ["a", "b", "c"]}), tmp_path / "a.parquet", write_statistics=False)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "notes.txt").write_text("no data")
    return tmp_path


def test_a_folder_of_parquet_has_the_text_its_footers_tell(folder):
    (folder / "b.jsonl").unlink()
    (folder / "inner/c.jsonl.gz").unlink()
    found = estimate_volume(prepare_config(path=str(folder)))
    assert found.n_bytes == pytest.approx(3000, rel=0.05)
    assert found.documents == 3
    assert str(folder) in found.basis


def test_lines_count_by_their_size_and_packed_ones_by_a_multiple_of_it(folder):
    (folder / "a.parquet").unlink()
    size, packed = ((folder / name).stat().st_size for name in ("b.jsonl", "inner/c.jsonl.gz"))
    found = estimate_volume(prepare_config(path=str(folder)))
    assert found.n_bytes == size + volume.GZIP * packed
    assert found.documents == pytest.approx(found.n_bytes / PROSE_DOCUMENT_BYTES)


def test_a_limit_on_documents_or_bytes_cuts_the_text(folder):
    for name in ("b.jsonl", "inner/c.jsonl.gz"):
        (folder / name).unlink()
    whole, third, more = (
        estimate_volume(prepare_config(path=str(folder), max_documents=n)) for n in (None, 1, 1_000_000)
    )
    assert (third.documents, third.n_bytes) == (1, pytest.approx(whole.n_bytes / 3))
    assert more == whole
    half = int(whole.n_bytes) // 2
    for limits, kept in (({"max_bytes": half}, half), ({"max_bytes": half, "max_documents": 1}, third.n_bytes)):
        assert estimate_volume(prepare_config(path=str(folder), **limits)).n_bytes == pytest.approx(kept)


@pytest.mark.parametrize(("name", "told"), [("absent", "is not a folder"), (".", r"holds no file named \*\.parquet")])
def test_a_folder_without_data_is_refused(tmp_path, name, told):
    with pytest.raises(UserError, match=rf"prepare\.path = .* {told}"):
        estimate_volume(prepare_config(path=str(tmp_path / name)))


def test_a_damaged_file_is_named(folder):
    (folder / "a.parquet").write_bytes(b"PAR1, cut off")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .*; replace it or remove it"):
        estimate_volume(prepare_config(path=str(folder)))


@pytest.mark.parametrize(("name", "tokens"), [("sample/10BT/*", 10e9), ("sample/350BT/*", 350e9), ("data/*", 10e9)])
def test_a_sample_of_fineweb_has_the_tokens_of_its_name(name, tokens):
    found = estimate_volume(plan_of("full", prepare__files=name).prepare)
    assert found.tokens == pytest.approx(tokens)
    assert found.n_bytes == pytest.approx(tokens * PROSE_BYTES_PER_TOKEN)
    assert ("billion tokens assumed" in found.basis) == (name == "data/*")


def test_documentation_is_a_share_of_the_source_of_the_packages():
    one, two = (estimate_volume(plan_of(prepare__packages=names).prepare) for names in (["numpy"], ["numpy", "pandas"]))
    assert 0 < one.n_bytes < two.n_bytes < 100e6
    assert "numpy" in one.basis and "pandas" in two.basis


def test_an_absent_package_is_named():
    with pytest.raises(UserError, match=r"prepare\.packages names no-such-package, which is not installed"):
        estimate_volume(plan_of(prepare__packages=["no-such-package"]).prepare)


# Time by a recorded run


@pytest.fixture
def recorded(tmp_path) -> Callable[..., dict]:
    """A function that writes dvc.lock and metrics of a run with the shipped parameters, and returns its seconds."""

    def record(gpu: bool = False, processes: int = 2, scale: str = "tiny") -> dict[str, float]:
        values = read(ROOT / "params.yaml")
        sections = {
            stage: [key.removeprefix("${scale}.") for key in STAGES[stage]["params"] if type(key) is str and "." in key]
            for stage in STAGES
        }
        stages = {
            stage: {"params": {"params.yaml": {f"{scale}.{name}": values[scale][name] for name in names}}}
            for stage, names in sections.items()
        }
        stages["train"]["params"]["params.yaml"]["norm"] = "preln"
        YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": stages}, tmp_path / "dvc.lock")
        seconds = {stage: 10.0 + i for i, stage in enumerate(STAGES)}
        for stage, figure in seconds.items():
            write_json(tmp_path / f"metrics/speed/{stage.replace('-', '_')}.json", {"seconds": figure})
        on_gpu = {"peak_gpu_memory_gib": 30.0} if gpu else {}
        write_json(
            tmp_path / "metrics/speed/train.json", {"seconds": seconds["train"], "processes": processes, **on_gpu}
        )
        write_json(tmp_path / "metrics/prepare.json", {"bytes": 12e6, "documents": 12e3})
        write_json(tmp_path / "metrics/tokens.json", {"bytes_per_token": 3.0})
        return seconds

    return record


def times(root: Path, plan: Plan, machine: Machine = LAPTOP, rate=never, text: Volume = VOLUME) -> dict[str, Estimate]:
    record = Record(read(ROOT / "params.yaml"), root)
    return by_stage(estimate_stages(Workload(plan, text, machine), record.stages(machine), rate))


def test_the_recorded_run_again_takes_its_own_time(recorded, tmp_path):
    seconds = recorded()
    for stage, estimate in times(tmp_path, plan_of()).items():
        assert estimate.seconds == pytest.approx(seconds[stage]), stage
        assert estimate.basis == "recorded run"


def test_the_recorded_text_counts_for_a_plan_that_reads_the_same(recorded, tmp_path):
    recorded()
    record = Record(read(ROOT / "params.yaml"), tmp_path)
    assert record.volume(plan_of()) == Volume(12e6, 12e3, 3.0, "as in metrics/prepare.json")
    assert record.volume(plan_of(prepare__min_chars=1)) is None
    assert record.volume(plan_of("full")) is None


def test_training_takes_longer_by_its_operations(recorded, tmp_path):
    seconds = recorded()
    plan = plan_of(train__max_steps=1200)
    ratio = needs_of(plan)["train"].flops / needs_of(plan_of())["train"].flops
    assert 2.5 < ratio < 3
    found = times(tmp_path, plan)
    assert found["train"].seconds == pytest.approx(ratio * seconds["train"])
    assert found["norm-study"].seconds == seconds["norm-study"]


def test_text_takes_longer_by_its_bytes_and_shorter_by_its_workers(recorded, tmp_path):
    seconds = recorded()
    text = replace(VOLUME, n_bytes=10 * VOLUME.n_bytes)
    found = times(tmp_path, plan_of(), text=text)
    # 120 MB are worth two processes, 12 MB none.
    assert found["tokenize"].seconds == pytest.approx(10 / 2 * seconds["tokenize"])
    assert found["tokenize"].basis == "recorded run"
    # Two workers on one core take turns.
    single = times(tmp_path, plan_of(), replace(LAPTOP, cores=1), text=text)
    assert single["tokenize"].need.parallel == 1


def test_at_another_scale_text_is_tokenized_at_the_rate_of_its_processes(recorded, tmp_path):
    recorded()
    text = replace(VOLUME, n_bytes=45e9, documents=1e7, bytes_per_token=4.5)
    found = times(tmp_path, plan_of("full"), SERVER, lambda: Rate(1e12, ""), text)["tokenize"]
    assert found.seconds == pytest.approx(45e9 / 16 / ENCODE_RATE)
    assert found.basis == "16 × 20 MB/s"
    # Two shards, 16 workers and what waits for its turn: under 2 GiB and 300 MiB a worker.
    assert 16 * TEXT_PROCESS < found.need.memory < 2 * 2**30 + 16 * 300 * 2**20


def test_another_source_is_read_at_another_rate(recorded, tmp_path):
    recorded()
    found = times(tmp_path, plan_of("short"), rate=lambda: Rate(1e12, ""))
    assert found["prepare"].seconds == pytest.approx(VOLUME.n_bytes / READ_RATE)


@pytest.mark.parametrize(("gpu", "machine"), [(True, LAPTOP), (False, SERVER)])
def test_models_are_not_compared_across_kinds_of_devices(recorded, tmp_path, gpu, machine):
    seconds = recorded(gpu=gpu)
    found = times(tmp_path, plan_of(), machine, lambda: Rate(1e12, "1 TFLOP/s"))
    assert found["train"].basis.endswith("× 1,000 GFLOP/s")
    assert found["tokenize"].seconds == pytest.approx(seconds["tokenize"])


def test_more_gpus_than_the_recorded_run_had_take_less_time(recorded, tmp_path):
    seconds = recorded(gpu=True, processes=1, scale="full")
    assert times(tmp_path, plan_of("full"), SERVER)["train"].seconds == pytest.approx(seconds["train"] / 2)


def test_models_are_not_compared_across_scales(recorded, tmp_path):
    recorded()
    found = times(tmp_path, plan_of("full"), rate=lambda: Rate(1e12, ""))
    assert found["train"].basis == found["hellaswag"].basis == "1 × 1,000 GFLOP/s"


@pytest.mark.parametrize("lock", [None, "", "stages: 3", "stages: {train: {}}", "}{"])
def test_without_a_sound_lock_there_is_no_record(tmp_path, lock):
    if lock is not None:
        (tmp_path / "dvc.lock").write_text(lock)
    record = Record(read(ROOT / "params.yaml"), tmp_path)
    assert record.stages(LAPTOP) == {} and record.volume(plan_of()) is None


def test_a_stage_whose_recorded_parameters_do_not_fit_is_left_out(recorded, tmp_path):
    recorded()
    lock = tmp_path / "dvc.lock"
    text = lock.read_text()
    assert text.count("tokens_per_step: ") == 1
    lock.write_text(text.replace("tokens_per_step: ", "tokens_per_stop: "))
    found = Record(read(ROOT / "params.yaml"), tmp_path).stages(LAPTOP)
    assert "train" not in found and "tokenize" in found


def test_a_stage_without_recorded_seconds_is_left_out(recorded, tmp_path):
    recorded()
    (tmp_path / "metrics/speed/report.json").unlink()
    found = times(tmp_path, plan_of())
    assert (found["report"].seconds, found["report"].basis) == (None, "no record")


# Time by operations and rate


def test_without_a_record_time_is_operations_over_rate_and_the_writing_of_checkpoints(tmp_path):
    plan = plan_of("full")
    workload = Workload(plan, VOLUME, SERVER)
    found = by_stage(estimate_stages(workload, {}, lambda: Rate(4e14, "")))
    # 95,365 steps with one checkpoint each 1,100.
    written = 86 * 12 * 124_439_808
    assert found["train"].seconds == pytest.approx(workload.needs()["train"].flops / 8e14 + written / WRITE_RATE)
    # One GPU, at half the rate.
    assert found["hellaswag"].seconds == pytest.approx(workload.needs()["hellaswag"].flops / 2e14)


def test_documentation_is_not_read_as_fast_as_text_and_has_no_rate_of_its_own():
    estimates = by_stage(estimate_stages(Workload(plan_of(), VOLUME, LAPTOP), {}, lambda: Rate(1e12, "")))
    assert (estimates["prepare"].seconds, estimates["prepare"].basis) == (None, "no record")


def test_the_reference_run_takes_about_its_time():
    """About 46 h on two A100."""
    a100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * 2**30, None, (8, 0))
    two = Machine(64, 2**38, 2**38, (a100, a100))
    plan = plan_of("full")
    found = by_stage(estimate_stages(Workload(plan, VOLUME, two), {}, lambda: device_rate(plan, two)))
    assert found["train"].seconds / 3600 == pytest.approx(46, rel=0.15)


def test_a_known_gpu_has_the_rate_of_its_data_sheet(monkeypatch):
    monkeypatch.setattr(forecast, "product_rate", lambda *_: pytest.fail("nothing is to be measured"))
    rate = device_rate(plan_of("full"), SERVER)
    assert rate.flops == forecast.PEAK_SHARE * PEAK_FLOPS["H200"]
    assert "NVIDIA H200" in rate.basis


@pytest.mark.parametrize(
    ("scale", "machine", "asked"),
    [
        ("full", replace(SERVER, gpus=(replace(H200, name="Unheard of"),)), ("cuda", 16, torch.bfloat16)),
        ("full", LAPTOP, ("cpu", 2, torch.bfloat16)),
        ("tiny", LAPTOP, ("cpu", 2, torch.float32)),
    ],
)
def test_any_other_device_is_measured(monkeypatch, scale, machine, asked):
    measured = []
    monkeypatch.setattr(forecast, "product_rate", lambda *arguments: measured.append(arguments) or 1e12)
    rate = device_rate(plan_of(scale), machine)
    assert measured == [asked]
    assert rate.flops == forecast.PRODUCT_SHARE[machine.device_type] * 1e12


def test_measuring_leaves_the_settings_of_torch_as_they_were(monkeypatch):
    monkeypatch.setattr(machine, "PRODUCT_SECONDS", 0.01)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert product_rate("cpu", 2, torch.float32) > 1e6
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


# The machine


def test_this_machine_has_cores_and_memory():
    found = look()
    assert found.cores >= 1
    assert 0 < found.available <= found.memory


def test_the_tightest_group_around_the_process_limits_its_memory(tmp_path):
    (tmp_path / "outer/inner").mkdir(parents=True)
    for group, limit, used in (("outer", "8000", "3000"), ("outer/inner", "max", "2000")):
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text(f"{used}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    assert machine._control_group_limits(tmp_path, own) == [(8000, 5000)]
    assert machine._control_group_limits(tmp_path, tmp_path / "absent") == []


class Properties:
    """What torch tells of a device."""

    name, total_memory, major, minor = "NVIDIA Test", 80 * 2**30, 9, 0


@pytest.fixture
def two_gpus(monkeypatch, tmp_path) -> Callable[[str], None]:
    """A function that pretends two GPUs, and an nvidia-smi with this body."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)

    def pretend(body: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return pretend


def test_free_memory_of_gpus_is_what_nvidia_smi_tells(two_gpus):
    two_gpus("echo 81000; echo 512")
    assert [gpu.free for gpu in look().gpus] == [81000 * 2**20, 512 * 2**20]
    assert look().gpus[0].capability == (9, 0)


@pytest.mark.parametrize("body", ["exit 9", "echo 81000", "echo '[N/A]'; echo '[N/A]'"])
def test_free_memory_is_unknown_where_nvidia_smi_does_not_tell(two_gpus, body):
    two_gpus(body)
    assert [gpu.free for gpu in look().gpus] == [None, None]


def test_nvidia_smi_is_asked_for_the_visible_gpus(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    two_gpus(f'echo "$@" > {tmp_path}/asked; echo 1; echo 2')
    assert [gpu.free for gpu in look().gpus] == [2**20, 2 * 2**20]
    assert (tmp_path / "asked").read_text().endswith("-i 3,5\n")


def test_changed_values_reach_the_plan():
    assert change({"train.max_steps": 7})["tiny"]["train"]["max_steps"] == 7
