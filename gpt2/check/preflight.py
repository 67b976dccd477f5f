"""Whether a run can start and finish on this machine: a finding for each thing that would stop it hours later."""

import errno
import os
import platform
import shutil
import socket
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gpt2.check.corpus_size import Volume
from gpt2.check.estimate import Estimate
from gpt2.check.machine import Machine
from gpt2.check.schema import check
from gpt2.check.storage import Demand, Links, device, nearest
from gpt2.check.workload import GIB, Plan
from gpt2.huggingface.pretrained import check_source
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import PARAMS_FILE
from gpt2.pipeline.quantities import show_count, show_size, show_time
from gpt2.tokenizer.encodings import SHA256, VOCABULARY_PACKAGE, load_encoding, trained_size

OK, WARNING, FAIL = "ok", "warning", "FAIL"
PROJECT, LOCKED = Path("pyproject.toml"), Path("requirements.lock")
# The parameter that sets how much memory a stage takes.
MEMORY_KEYS = {
    "prepare": "hardware.workers",
    "tokenize": "hardware.workers or tokenize.shard_tokens",
    "tokenizer-study": "vocabulary.train_bytes",
    "norm-study": "norm_study.micro_batch or hardware.threads",
    "train": "train.micro_batch",
    "hellaswag": "hellaswag.batch_tokens",
    "generate": "model.n_embd",
    "head-similarity": "heads.batch_size",
    "prune": "prune.batch_size",
}
# The variable that names a compiler, and what is looked for without it.
COMPILERS = {"cuda": ("CC", ("cc", "gcc", "clang")), "cpu": ("CXX", ("c++", "g++", "clang++"))}
ROOM = "make room, link outs (dvc config --local cache.type hardlink), or move the cache (dvc cache dir --local FOLDER)"
# Of a disk, left over after the run.
SPARE = 0.1
CONNECT_SECONDS = 3
# First units with bfloat16.
AMPERE = (8, 0)


@dataclass(frozen=True)
class CheckResult:
    """What was found beside the rule for it, and what to do about it."""

    name: str
    mark: Literal["ok", "warning", "FAIL"]
    text: str
    remedy: str = ""


def check_parameters(values: dict) -> CheckResult:
    """All scales of params.yaml, by the rules that the stage check-params applies."""
    try:
        check(values)
    except UserError as error:
        return CheckResult("parameters", FAIL, str(error))
    return CheckResult("parameters", OK, f"{PARAMS_FILE}: every section of every scale is valid")


def check_versions(
    root: Path, python: str = platform.python_version(), installed: str = torch.__version__
) -> CheckResult:
    """Python and torch against pyproject.toml, and torch against requirements.lock."""
    project = tomllib.loads((root / PROJECT).read_text(encoding="utf-8"))["project"]
    wanted = next(need for need in map(Requirement, project["dependencies"]) if need.name == "torch").specifier
    pins = dict(line.split("==") for line in (root / LOCKED).read_text(encoding="utf-8").splitlines() if "==" in line)
    # Builds for CPU and CUDA differ by what follows the plus sign.
    public = installed.partition("+")[0]
    text = f"Python {python} ({project['requires-python']}), torch {installed} ({wanted}, pinned {pins['torch']})"
    if python not in SpecifierSet(project["requires-python"]) or not wanted.contains(public, prereleases=True):
        return CheckResult("versions", FAIL, text, "make a new environment: make setup PYTHON=python3.12")
    if public != pins["torch"]:
        return CheckResult("versions", WARNING, text, "make setup installs the pin; others may change the last bits")
    return CheckResult("versions", OK, text)


def check_gpus(plan: Plan, machine: Machine, estimates: Sequence[Estimate]) -> CheckResult:
    """GPUs against the number of processes, the precision and the memory that the models take."""
    if not machine.gpus:
        return _check_without_gpu(plan, estimates)
    nproc, key = plan.hardware.nproc, f"{plan.scale}.hardware.nproc"
    count, total = len(machine.gpus), min(gpu.total for gpu in machine.gpus)
    free = min(total if gpu.free is None else gpu.free for gpu in machine.gpus)
    names = ", ".join(f"{n} × {name}" for name, n in Counter(gpu.name for gpu in machine.gpus).items())
    stage, need = max(((e.stage, e.need.gpu_memory) for e in estimates), key=lambda pair: pair[1])
    text = f"{names}; {free / GIB:.1f} of {total / GIB:.1f} GiB free, {stage} takes about {need / GIB:.1f}"
    if nproc != "gpu" and nproc > count:
        return CheckResult("GPU", FAIL, f"{names}; {key}={nproc} must not exceed {count}", f"lower it to {count}")
    if need > total:
        return CheckResult("GPU", FAIL, text, f"lower {plan.scale}.{MEMORY_KEYS[stage]}")
    if plan.train.precision == "bfloat16" and min(gpu.capability for gpu in machine.gpus) < AMPERE:
        return CheckResult(
            "GPU", WARNING, f"{text}; bfloat16 is emulated before Ampere", "expect a fraction of the speed"
        )
    if need > free:
        return CheckResult("GPU", WARNING, f"{text}: others hold memory", "wait for them, or end them (nvidia-smi)")
    if nproc != "gpu" and nproc < count:
        return CheckResult("GPU", WARNING, f"{text}; {key}={nproc} leaves {count - nproc} idle", "set it to gpu")
    return CheckResult("GPU", OK, text)


def _check_without_gpu(plan: Plan, estimates: Sequence[Estimate]) -> CheckResult:
    seconds = next((e.seconds for e in estimates if e.stage == "train"), None)
    slow = f"on this CPU training would take {show_time(seconds)}"
    text = "none that torch can use" + ("" if torch.version.cuda else f" (torch {torch.__version__} has no CUDA)")
    if plan.hardware.nproc == "gpu":
        rule = f"{plan.scale}.hardware.nproc=gpu needs one"
        return CheckResult("GPU", FAIL, f"{text}; {rule}", f"take a machine with one, or set a number: {slow}")
    meant = ["train.precision=bfloat16"] * (plan.train.precision == "bfloat16") + ["train.compile"] * plan.train.compile
    if meant:
        return CheckResult("GPU", WARNING, f"{text}; {' and '.join(meant)} want one: {slow}", "take a machine with one")
    return CheckResult("GPU", OK, f"{text}; {plan.scale} trains without")


def check_compiler(device_type: str, which: Callable[[str], str | None] = shutil.which) -> CheckResult:
    """What Triton needs at the first loss and token on a GPU, and torch.compile at the first step of training."""
    variable, names = COMPILERS[device_type]
    found = [path for name in (os.environ.get(variable), *names) if name and (path := which(name))]
    on_gpu = device_type == "cuda"
    needed = "the loss and generation on a GPU" if on_gpu else "train.compile"
    if found:
        return CheckResult("compiler", OK, f"{found[0]}, for {needed}")
    remedy = f"install one or name it in {variable}" + ("" if on_gpu else ", or set train.compile=false")
    return CheckResult("compiler", FAIL, f"none of {', '.join(names)} is on the PATH; {needed} needs one", remedy)


def check_batch(plan: Plan, processes: int) -> CheckResult:
    """The tokens of a step among the processes, whose number params.yaml does not tell where it says gpu."""
    train, block_size = plan.train, plan.model.block_size
    if train.init_from:
        return CheckResult("batch", OK, "no step is taken: train.init_from gives the weights")
    world = processes * plan.hardware.nnodes
    try:
        passes = train.accumulation(block_size, world)
    except UserError as error:
        return CheckResult("batch", FAIL, f"{plan.scale}.{error}")
    parts = f"{world} × {passes} × {train.micro_batch} × {block_size}"
    text = f"{train.tokens_per_step:,} tokens a step = {parts} (processes × passes × windows × tokens)"
    return CheckResult("batch", OK, text)


def check_weights(plan: Plan) -> CheckResult:
    """The pretrained weights that take the place of training, as far as can be told without the hub."""
    source = plan.train.init_from
    try:
        check_source(source, plan.model, plan.scale)
    except UserError as error:
        return CheckResult("weights", FAIL, str(error))
    return CheckResult("weights", OK, f"train.init_from: {source}")


def check_cores(plan: Plan, machine: Machine) -> CheckResult:
    """Threads and workers against the cores that this process may use."""
    asked = {name: getattr(plan.hardware, name) for name in ("threads", "workers")}
    text = f"{machine.cores} cores for {' and '.join(f'{n} {name}' for name, n in asked.items())}"
    if over := [name for name, n in asked.items() if n > machine.cores]:
        return CheckResult(
            "CPU", WARNING, text, f"lower {plan.scale}.hardware.{' and .'.join(over)}: the rest only waits"
        )
    return CheckResult("CPU", OK, text)


def check_memory(plan: Plan, machine: Machine, estimates: Sequence[Estimate]) -> CheckResult:
    """Memory against the stage that takes most."""
    stage, need = max(((e.stage, e.need.memory) for e in estimates), key=lambda pair: pair[1])
    text = f"{machine.available / GIB:.1f} of {machine.memory / GIB:.1f} GiB free, {stage} takes about {need / GIB:.1f}"
    if need > machine.memory:
        return CheckResult("memory", FAIL, text, f"lower {plan.scale}.{MEMORY_KEYS[stage]}")
    if need > machine.available:
        return CheckResult("memory", WARNING, f"{text}: others hold memory", "wait for them, or end them")
    return CheckResult("memory", OK, text)


def check_links(links: Links, written: float) -> CheckResult:
    """How DVC stores outs of `written` bytes in all, and what that costs."""
    text = f"cache.type={','.join(links.configured)}; this disk has {', '.join((*links.works, 'copy'))}"
    if links.used is None:
        return CheckResult("links", FAIL, f"{text}; none in common", "dvc config --local cache.type reflink,copy")
    if links.used != "copy":
        return CheckResult("links", OK, f"{text}; {links.used}: each out is stored once")
    return CheckResult("links", OK, f"{text}; copy: each out is stored twice, {show_size(written)} more")


def check_disk(demands: Sequence[Demand], free: Callable[[Path], int]) -> list[CheckResult]:
    """Free bytes of each file system against all that goes there."""
    findings = []
    for disk in dict.fromkeys(device(demand.path) for demand in demands):
        here = [demand for demand in demands if device(demand.path) == disk]
        need, have = sum(demand.n_bytes for demand in here), free(nearest(here[0].path))
        parts = ", ".join(f"{demand.name} {show_size(demand.n_bytes)}" for demand in here)
        text = f"{show_size(have)} free, a run adds {show_size(need)} ({parts})"
        if need > have:
            findings.append(CheckResult("disk", FAIL, text, ROOM))
        elif need > (1 - SPARE) * have:
            findings.append(CheckResult("disk", WARNING, f"{text}; less than a tenth would be left", "make room"))
        else:
            findings.append(CheckResult("disk", OK, text))
    return findings


def free_bytes(path: Path) -> int:
    """What this user can still write to the file system of `path`."""
    return shutil.disk_usage(path).free


def check_port(hardware: HardwareConfig) -> CheckResult:
    """Where torchrun's processes meet: rdzv_endpoint with several machines, else any port of this one."""
    name = hardware.local_addr or socket.getfqdn()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        text = f"this machine's name {name} has no address ({error.strerror}), and processes meet under it"
        return CheckResult("port", FAIL, text, "add it to /etc/hosts, or set hardware.local_addr")
    if hardware.nnodes == 1:
        return _check_loopback()
    host, _, port = hardware.rdzv_endpoint.rpartition(":")
    return _check_endpoint(host.strip("[]"), int(port), f"hardware.rdzv_endpoint={hardware.rdzv_endpoint}")


def _check_loopback() -> CheckResult:
    try:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
    except OSError as error:
        text = f"no port of localhost can be opened ({error.strerror}), as torchrun --standalone does"
        return CheckResult("port", FAIL, text, "let processes of this user listen on localhost")
    return CheckResult("port", OK, f"localhost gives free ports (tried {port}), as torchrun --standalone asks")


def _check_endpoint(host: str, port: int, key: str) -> CheckResult:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return CheckResult("port", FAIL, f"{key}: {host} has no address ({error.strerror})", "mend the name")
    # Only an address of this machine can be bound.
    try:
        with socket.create_server(address[:2], family=family):
            return CheckResult("port", OK, f"{key} is on this machine and free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{key} is on this machine and in use, by a run in progress or another program"
            return CheckResult("port", FAIL, text, "end it or choose another port")
        if error.errno != errno.EADDRNOTAVAIL:
            return CheckResult("port", FAIL, f"{key} cannot be opened ({error.strerror})", "choose a port above 1023")
    try:
        socket.create_connection(address[:2], CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        text = f"{key}: {host} answers, nobody waits at port {port} yet"
        return CheckResult("port", WARNING, text, "start the machines within minutes of each other")
    except OSError as error:
        text = f"{key} cannot be reached from here ({error.strerror or 'no answer'})"
        return CheckResult("port", FAIL, text, "check the address, the network and the firewall")
    return CheckResult("port", OK, f"{key}: {host} waits there")


def check_tokenizer(encoding: str) -> CheckResult:
    """The vocabulary files, by their digests; a vocabulary still to be trained has none."""
    if size := trained_size(encoding):
        return CheckResult("tokenizer", OK, f"{encoding}, {size:,} tokens, which the stage tokenize trains")
    try:
        loaded = load_encoding(encoding)
    except UserError as error:
        return CheckResult("tokenizer", FAIL, str(error))
    digests = ", ".join(f"{name} {digest[:8]}…" for name, digest in SHA256.items())
    return CheckResult(
        "tokenizer", OK, f"{encoding}, {loaded.n_vocab:,} tokens; sha256 {digests} ({VOCABULARY_PACKAGE})"
    )


def check_text(plan: Plan, volume: Volume, steps: int) -> CheckResult:
    """The splits against the tokens that training and the studies read from them."""
    percent = {"val": plan.prepare.val_percent, "test": plan.prepare.test_percent}
    percent["train"] = 100 - sum(percent.values())
    wanted = [
        ("train", "train.tokens_per_step", plan.train.tokens_per_step),
        ("train", "norm_study.train_tokens", plan.norm_study.train_tokens),
        ("train", "prune.calibration_tokens", plan.prune.calibration_tokens),
        ("val", "train.eval_tokens", plan.train.eval_tokens),
        ("val", "norm_study.eval_tokens", plan.norm_study.eval_tokens),
        ("val", "heads.n_tokens", plan.heads.n_tokens),
        ("val", "prune.scoring_tokens", plan.prune.scoring_tokens),
        ("val", "prune.greedy_tokens", plan.prune.greedy_tokens),
        ("test", "prune.eval_tokens", plan.prune.eval_tokens),
    ]
    has = {split: volume.tokens * share / 100 for split, share in percent.items()}
    epochs = steps * plan.train.tokens_per_step / has["train"]
    amount = f"{show_size(volume.n_bytes)}, {show_count(volume.tokens)} tokens ({volume.basis})"
    text = f"{amount}; {steps:,} steps read the training split {epochs:.2g} times"
    short = [f"{plan.scale}.{key}={n:,} of {show_count(has[split])}" for split, key, n in wanted if n > has[split]]
    if short:
        remedy = f"prepare more text, raise {plan.scale}.prepare.val_percent or test_percent, or lower them"
        return CheckResult("text", FAIL, f"{text}; too few for {', '.join(short)}", remedy)
    return CheckResult("text", OK, text)
