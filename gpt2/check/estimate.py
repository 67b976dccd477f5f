"""How long each stage will take: in proportion to a run that was measured, or from operations and the device's rate."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from ruamel.yaml import YAML, YAMLError

from gpt2.check.corpus_size import Volume
from gpt2.check.machine import Machine, product_rate
from gpt2.check.workload import Need, Plan, Workload, load_plan
from gpt2.pipeline.files import UserError, read_json
from gpt2.pipeline.params import PARAMS_FILE
from gpt2.pipeline.quantities import show_rate
from gpt2.pipeline.stage import SPEED
from gpt2.train.results import PEAK_FLOPS

LOCK = Path("dvc.lock")
RECORDED = "recorded run"
# Sections on which the work of later stages depends.
MAKERS = ("prepare", "benchmark", "model")
PREPARED, TOKENIZED = Path("metrics/prepare.json"), Path("metrics/tokens.json")

# Share of a GPU's data-sheet rate that training reaches: compiled GPT-2 (124M) in bfloat16 on one H100, 41 %.
PEAK_SHARE = 0.40
# Share of the rate of large products that it reaches: on a CPU as in bench/results/train_cpu.md, on a GPU the above.
PRODUCT_SHARE = {"cpu": 0.44, "cuda": 0.50}
# The other stages on a GPU are not compiled, and where they need fp32 they have TF32, at half the rate of bfloat16.
STUDY_SHARE = {"cpu": 1.0, "cuda": 0.5}
# Text that one process reads, hashes and writes as Parquet, in bytes per second.
READ_RATE = 1e8
# Text that one process tokenizes, in bytes per second: bench/results/tokenize_2_cores.md.
ENCODE_RATE = 2e7
# Synced writes of a checkpoint, in bytes per second.
WRITE_RATE = 5e8


@dataclass(frozen=True)
class Rate:
    """Operations per second of one device in training, and how that is known."""

    flops: float
    basis: str


@dataclass(frozen=True)
class PastRun:
    """A stage as it was last run: its scale, its source of text, what it did, on which device, in how many seconds."""

    scale: str
    source: str
    need: Need
    device_type: str
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """One stage of a forecast: seconds (None if unknown) and where they come from, beside what the stage needs."""

    stage: str
    need: Need
    seconds: float | None
    basis: str


def device_rate(plan: Plan, machine: Machine) -> Rate:
    """The rate of one device of this machine: of a known GPU by its data sheet, of any other measured now."""
    kind = machine.device_type
    name = machine.gpus[0].name if machine.gpus else ""
    for part, peak in PEAK_FLOPS.items():
        if part in name:
            return Rate(PEAK_SHARE * peak, f"{PEAK_SHARE:.0%} of the {show_rate(peak)} of {name}")
    dtype = torch.bfloat16 if plan.train.precision == "bfloat16" else torch.float32
    threads = min(plan.hardware.threads, machine.cores)
    product = product_rate(kind, threads, dtype)
    basis = (
        f"{PRODUCT_SHARE[kind]:.0%} of the {show_rate(product)} just measured for {plan.train.precision} products of "
        f"{name or f'{threads} CPU threads'}, at a load of {os.getloadavg()[0]:.1f}"
    )
    return Rate(PRODUCT_SHARE[kind] * product, basis)


def estimate_stages(workload: Workload, recorded: Mapping[str, PastRun], rate: Callable[[], Rate]) -> list[Estimate]:
    """The forecast of every stage; `rate` is asked only if a stage has no comparable record."""
    estimates = []
    for stage, need in workload.needs().items():
        past = recorded.get(stage)
        if past and _comparable(stage, past, workload):
            seconds, basis = past.seconds * need.work / past.need.work, RECORDED
            basis += "" if past.scale == workload.plan.scale else f" ({past.scale})"
        elif need.flops:
            share = 1.0 if stage == "train" else STUDY_SHARE[workload.machine.device_type]
            flops = share * rate().flops
            seconds, basis = need.work / flops, f"{need.parallel} × {show_rate(flops)}"
            if stage == "train":
                seconds += workload.checkpoints * workload.checkpoint_bytes / WRITE_RATE
        elif stage == "prepare" and workload.plan.prepare.source != "docs":
            seconds, basis = need.work / READ_RATE, f"{READ_RATE / 1e6:.0f} MB/s"
        elif stage == "tokenize":
            seconds, basis = need.work / ENCODE_RATE, f"{need.parallel} × {ENCODE_RATE / 1e6:.0f} MB/s"
        else:
            seconds, basis = None, "no record"
        estimates.append(Estimate(stage, need, seconds, basis))
    return estimates


def _comparable(stage: str, past: PastRun, workload: Workload) -> bool:
    """Models must have run at the same scale on the same kind of device, text must have been read in the same way.

    Of the seconds in which a small text is tokenized most are spent on other things.
    """
    if past.need.flops:
        return (past.scale, past.device_type) == (workload.plan.scale, workload.machine.device_type)
    if stage == "tokenize":
        return past.scale == workload.plan.scale
    return stage != "prepare" or past.source == workload.plan.prepare.source


class Record:
    """The run that dvc.lock describes, with the seconds that metrics/speed/ holds for it.

    DVC records the sections that a stage read under the name of their scale. `hardware` is not recorded, so that of
    params.yaml is taken. A stage whose parameters no longer fit the code is left out.
    """

    def __init__(self, values: dict, root: Path):
        self._values, self._root = values, root
        try:
            stages = YAML(typ="safe", pure=True).load((root / LOCK).read_text(encoding="utf-8"))["stages"]
            params = {stage: entry.get("params", {}).get(str(PARAMS_FILE), {}) for stage, entry in stages.items()}
        except (OSError, YAMLError, AttributeError, KeyError, TypeError):
            params = {}
        # By stage: its sections as {(scale, name): values}.
        self._sections = {
            stage: {tuple(key.split(".", 1)): value for key, value in keys.items() if "." in key}
            for stage, keys in params.items()
        }
        self._norm = params.get("train", {}).get("norm", values.get("norm"))

    def volume(self, plan: Plan) -> Volume | None:
        """The text of the recorded run, if it read what `plan` reads."""
        past = self._plan("prepare")
        return self._volume() if past and past.prepare == plan.prepare else None

    def stages(self, machine: Machine) -> dict[str, PastRun]:
        """Every stage that has a record, as if it had run on a machine with as many cores."""
        volume, trained = self._volume(), self._metrics(SPEED / "train.json")
        device_type = "cuda" if "peak_gpu_memory_gib" in trained else "cpu"
        found = {}
        for stage in self._sections:
            plan, speed = self._plan(stage), self._metrics(SPEED / f"{stage.replace('-', '_')}.json")
            need = Workload(plan, volume, machine).needs().get(stage) if plan and volume else None
            if need and "seconds" in speed:
                if device_type == "cuda" and stage == "train":
                    need = replace(need, parallel=speed["processes"])
                found[stage] = PastRun(plan.scale, plan.prepare.source, need, device_type, speed["seconds"])
        return found

    def _plan(self, stage: str) -> Plan | None:
        """What `stage` had before it: its own sections, those that made its inputs, and the others of params.yaml."""
        own = self._sections.get(stage)
        if not own:
            return None
        scale = next(iter(own))[0]
        everything = {key: value for sections in self._sections.values() for key, value in sections.items()}
        before = {key: value for key, value in everything.items() if key[1] in MAKERS}
        block = {name: value for (of, name), value in {**before, **own}.items() if of == scale}
        values = {**self._values, "norm": self._norm, scale: {**self._values.get(scale, {}), **block}}
        try:
            return load_plan(values, scale)
        except UserError:
            return None

    def _volume(self) -> Volume | None:
        prepared, tokenized = self._metrics(PREPARED), self._metrics(TOKENIZED)
        try:
            n_bytes, documents = prepared["bytes"], prepared["documents"]
            return Volume(n_bytes, documents, tokenized["bytes_per_token"], f"as in {PREPARED}")
        except KeyError:
            return None

    def _metrics(self, path: Path) -> dict:
        try:
            return read_json(self._root / path)
        except UserError:
            return {}
