"""The checks of a preflight: each looks for one thing that would stop a run hours later.

A check returns what it found, with WARNING in front if it only slows the run, or raises UserError.
"""

import errno
import os
import platform
import re
import shutil
import socket
import tempfile
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from dvc.config import Config, ConfigError
from dvc.fs import generic, localfs
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gpt2.check.estimate import Plan, measure_rate
from gpt2.huggingface.pretrained import check_source
from gpt2.pipeline.files import UserError, read_json
from gpt2.pipeline.quantities import show_size, show_time
from gpt2.pipeline.scratch import scratch_root
from gpt2.train.checkpoint import KEPT

WARNING = "warning: "
GIB = 2**30
TOKENS, TOKENIZED = Path("data/tokens"), Path("metrics/tokens.json")
# DVC's choice where cache.type is not set, and the types that a file system may lack.
DEFAULT_LINKS, LINKS = ["reflink", "copy"], ["reflink", "hardlink", "symlink"]
# uint16. The corpus as compressed Parquet takes about as much, files of the hub 1.4 times as much.
TOKEN_BYTES, HUB_SHARE = 2, 1.4


def check_versions(_: Plan, python: str = platform.python_version(), installed: str = torch.__version__) -> str:
    """Python and torch against pyproject.toml, and torch against requirements.lock."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(need for need in map(Requirement, project["dependencies"]) if need.name == "torch").specifier
    pinned = re.search(r"^torch==(\S+)", Path("requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    # Builds for CPU and CUDA differ by what follows the plus sign.
    public = installed.partition("+")[0]
    text = f"Python {python} ({project['requires-python']}), torch {installed} ({wanted}, {pinned and pinned[0]})"
    if python not in SpecifierSet(project["requires-python"]) or not wanted.contains(public, prereleases=True):
        raise UserError(f"{text}: not supported; make a new environment with make setup PYTHON=python3.12")
    if pinned and public != pinned[1]:
        return f"{WARNING}{text}; another version may change the last bits, make setup installs the pinned one"
    return text


def check_gpus(plan: Plan) -> str:
    """The visible GPUs against the processes and settings of training."""
    nproc, key, train = plan.block.hardware.nproc, f"{plan.scale}.hardware.nproc", plan.block.train
    count = torch.cuda.device_count()
    if count < plan.processes and (count or nproc == "gpu"):
        found = f"torch {torch.__version__} finds {count} GPUs"
        raise UserError(f"{key}={nproc} needs at least {plan.processes}, {found}; change it or use another machine")
    if not count:
        meant = f"train.precision={train.precision}, compile={train.compile} are meant for a GPU"
        return f"{WARNING}none; {meant}" if train.compile or train.precision != "float32" else "none, none needed"
    text = f"{count} × {torch.cuda.get_device_name()}"
    return f"{WARNING}{text}; {key}={nproc} leaves some idle, set it to gpu" if plan.processes < count else text


def check_memory(plan: Plan) -> str:
    """What training takes against the memory of the smallest GPU, or of this machine for all processes on CPUs."""
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    need = plan.training_memory if gpus else plan.processes * plan.training_memory
    have = min(gpus) if gpus else psutil.virtual_memory().total
    text = f"training takes about {need / GIB:.1f} of {have / GIB:.1f} GiB{' on each GPU' if gpus else ''}"
    if need > have:
        raise UserError(f"{text}; lower {plan.scale}.train.micro_batch={plan.block.train.micro_batch}")
    return text


def check_training(plan: Plan) -> str:
    """The pretrained weights, or without them the division of a step's tokens among the processes."""
    train, block_size, world = plan.block.train, plan.model.block_size, plan.world_size
    if train.init_from:
        check_source(train.init_from, plan.model, plan.scale)
        return f"no step is taken, train.init_from={train.init_from} replaces training"
    parts = f"{world} × {train.accumulation(block_size, world)} × {train.micro_batch} × {block_size}"
    return f"{train.tokens_per_step:,} tokens a step = {parts} (processes × passes × windows × tokens)"


def check_compiler(plan: Plan) -> str:
    """The compiler that Triton needs for the loss on a GPU, and torch.compile for the first step of training."""
    on_gpu = torch.cuda.is_available()
    variable, names = ("CC", ("cc", "gcc", "clang")) if on_gpu else ("CXX", ("c++", "g++", "clang++"))
    if not on_gpu and (plan.block.train.init_from or not plan.block.train.compile):
        return "none needed"
    found = [path for name in (os.environ.get(variable), *names) if name and (path := shutil.which(name))]
    if not found:
        rule = "Triton needs one on a GPU" if on_gpu else f"{plan.scale}.train.compile=true needs one"
        raise UserError(f"none of {', '.join(names)} is on the PATH, {rule}; install one or name it in {variable}")
    return found[0]


def check_disk(plan: Plan) -> str:
    """How DVC stores outs; free bytes of each file system against tokens, weights and checkpoints still to come."""
    (cache, link), (tokens, basis) = find_cache(), estimate_tokens(plan)
    text, weights = TOKEN_BYTES * tokens, 4 * plan.n_params
    if plan.is_prepared and TOKENS.is_dir():
        text, basis = 0.0, f"{TOKENS} is in place"
    demands = {
        "workspace": (Path.cwd(), 2 * (text + weights) if link == "copy" else 0.0),
        "DVC cache": (cache, 2 * (text + weights)),
        # Weights and two moments each, and the weights of the last evaluation.
        "checkpoints": (scratch_root(), 0.0 if plan.block.train.init_from else (KEPT + 1) * 3 * weights + 2 * weights),
        "hub cache": (Path(HF_HUB_CACHE), 0.0 if plan.block.prepare.source in ("docs", "files") else HUB_SHARE * text),
    }
    lines = [f"DVC stores outs {'twice' if link == 'copy' else 'once'}, cache.type={link}"]
    disks = {name: existing_parent(path) for name, (path, size) in demands.items() if size}
    for device, disk in {folder.stat().st_dev: folder for folder in disks.values()}.items():
        sizes = {name: demands[name][1] for name, folder in disks.items() if folder.stat().st_dev == device}
        need, have = sum(sizes.values()), shutil.disk_usage(disk).free
        parts = ", ".join(f"{name} {show_size(size)}" for name, size in sizes.items())
        lines.append(f"{show_size(have)} free, a run adds about {show_size(need)}: {parts} ({basis})")
        if need > have:
            raise UserError(f"{lines[-1]}; make room, or move or link the cache: dvc cache dir, dvc config cache.type")
    return "\n".join(lines)


def find_cache() -> tuple[Path, str]:
    """Return DVC's cache and the type of link that DVC uses there. Raises UserError if it has none that works."""
    try:
        settings = Config(".dvc")["cache"]
        cache, configured = Path(settings.get("dir") or ".dvc/cache"), list(settings.get("type") or DEFAULT_LINKS)
        # Git and DVC ignore these names. DVC's function writes a sibling of its last argument.
        with (
            tempfile.TemporaryDirectory(prefix=".check_", suffix=".tmp", dir=existing_parent(cache)) as source,
            tempfile.TemporaryDirectory(prefix=".check_", suffix=".tmp", dir=Path.cwd()) as target,
        ):
            works = [*generic.test_links(LINKS, localfs, source, localfs, os.path.join(target, "sibling")), "copy"]
    except (ConfigError, OSError) as error:
        raise UserError(f"DVC's cache cannot be used ({error}); correct it, see dvc config --list") from error
    if link := next((link for link in configured if link in works), None):
        return cache, link
    faulty = f"cache.type={','.join(configured)}, but this disk has only {', '.join(works)}"
    raise UserError(f"{faulty}; set another: dvc config --local cache.type reflink,copy")


def existing_parent(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def estimate_tokens(plan: Plan) -> tuple[float, str]:
    """Return the tokens of all splits together, 0 if unknown, and where the figure comes from."""
    if plan.is_prepared and TOKENIZED.is_file():
        counts = read_json(TOKENIZED)
        return sum(counts[f"tokens_{split}"] for split in ("train", "val", "test")), str(TOKENIZED)
    path, most = plan.block.prepare.path, plan.block.prepare.max_bytes
    # A token of English text has about four bytes, and two or more where the text is compressed.
    found = [(most / 4, "prepare.max_bytes")] if most else []
    if path and not path.is_dir():
        raise UserError(f"{plan.scale}.prepare.path = '{path}' is not a folder; put text there or name another folder")
    if path:
        found.append((sum(file.stat().st_size for file in path.rglob("*")) / 2, f"size of {path}"))
    elif billions := re.search(r"(\d+)BT", str(plan.block.prepare)):
        found.append((1e9 * int(billions[1]), f"{billions[0]} in {plan.scale}.prepare"))
    return min(found, default=(0.0, "text of unknown size"))


def check_port(plan: Plan) -> str:
    """Where torchrun's processes meet: rdzv_endpoint with several machines, else any port of this one."""
    hardware, key = plan.block.hardware, f"{plan.scale}.hardware.rdzv_endpoint"
    endpoint, own = hardware.rdzv_endpoint or "localhost:0", hardware.local_addr or socket.getfqdn()
    host, _, port = endpoint.replace("[", "").replace("]", "").rpartition(":")
    try:
        socket.getaddrinfo(own, None)
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        try:
            socket.create_server(address[:2], family=family).close()
            return f"{endpoint} is on this machine and free"
        except OSError as error:
            # Only an address of this machine can be bound.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
        # A host that refuses can be reached, though nobody listens there yet.
        with suppress(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=3).close()
    except socket.gaierror as error:
        raise UserError(f"{key}={endpoint} or local_addr={own} has no address ({error}); correct it") from error
    except OSError as error:
        remedy = "choose another port, or check address, network and firewall"
        raise UserError(f"{key}={endpoint} can be neither opened nor reached ({error}); {remedy}") from error
    return f"{key}={endpoint} can be reached; start the machines within minutes of each other"


def check_time(plan: Plan) -> str:
    """How long training takes, by a rate measured on this machine."""
    train, held_out = plan.block.train, plan.block.prepare.val_percent + plan.block.prepare.test_percent
    if train.init_from:
        return "no training"
    tokens = (train.max_steps or 0) * train.tokens_per_step
    if train.epochs:
        tokens = round(train.epochs * (1 - held_out / 100) * estimate_tokens(plan)[0])
    if not tokens:
        return "unknown: a number of epochs of a text of unknown size"
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < plan.training_memory:
        return f"{WARNING}not measured, as other processes hold the memory of the GPU; wait for them"
    rate, basis = measure_rate(plan)
    taken = f"training takes about {show_time(tokens / rate)}: {tokens:,} tokens at {rate:,.0f} tokens/s"
    return f"{taken}\n({basis}); evaluations and checkpoints come on top"


CHECKS: dict[str, Callable[[Plan], str]] = {
    "versions": check_versions,
    "GPU": check_gpus,
    "memory": check_memory,
    "training": check_training,
    "compiler": check_compiler,
    "disk": check_disk,
    "port": check_port,
    "time": check_time,
}
