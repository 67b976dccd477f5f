"""The training engine where it will be used: GPT-2 (124M) on real GPUs, killed and resumed, alone and in a pair.

    python -m bench.gpu TOKENS OUT NAME ...

TOKENS is a folder as the stage `tokenize` writes it. Each NAME is one of the experiments below: the stage `train` as
the pipeline runs it, under torchrun, in a folder of its own with the `short` block of params.yaml and the changes
given. Results go to OUT/NAME.json; `python -m bench.gpu_table` makes bench/results/gpu.md and its picture of them. The
speed is measured by bench.speed.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil
import torch

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import read_json, write_json
from gpt2.pipeline.params import read

ROOT = Path(__file__).resolve().parent.parent
# 40 million tokens in 80 steps: long enough for the loss to leave the unigram entropy, minutes on one GPU.
LENGTH = {
    # Divides the steps of two processes too.
    "micro_batch": 64,
    **{"max_steps": 80, "warmup_steps": 20, "eval_interval": 40, "checkpoint_interval": 20, "log_interval": 10},
    **{"eval_tokens": 131072, "eval_items": 10042},
}
SHORT = {**LENGTH, "max_steps": 40, "tokens_per_step": 131072, "eval_items": 100}
# As many tokens as `full` validates on.
EVALUATED = {
    **LENGTH,
    **{"max_steps": 12, "warmup_steps": 6, "eval_interval": 12, "checkpoint_interval": 12, "eval_tokens": 10485760},
}


@dataclass(frozen=True)
class Experiment:
    """A run of the stage `train`: what differs from params.yaml, and how it is disturbed."""

    says: str
    nproc: int = 1
    norm: str = "preln"
    train: dict = field(default_factory=lambda: LENGTH)
    # SIGKILL to all processes, or to the last worker alone, after the checkpoint of `after_step`.
    kill: str = ""
    after_step: int = 0


EXPERIMENTS = {
    "whole": Experiment("Pre-LN, undisturbed"),
    "fused": Experiment("Pre-LN, undisturbed, the loss in one kernel"),
    "killed": Experiment("Pre-LN, all processes killed, run again", kill="all", after_step=40),
    "postln": Experiment("Post-LN, the same steps", norm="postln"),
    "deepnorm": Experiment("DeepNorm, the same steps", norm="deepnorm"),
    "muon": Experiment("Pre-LN, Muon", train={**LENGTH, "optimizer": "muon"}),
    "pair": Experiment("Pre-LN on two GPUs", nproc=2),
    "pair-killed": Experiment("Pre-LN on two GPUs, one worker killed", nproc=2, kill="worker", after_step=40),
    "evaluating": Experiment("Pre-LN, evaluated as at full", train=EVALUATED),
    "free": Experiment("a short run", train=SHORT),
    "free-again": Experiment("the short run once more", train=SHORT),
    "exact": Experiment("the short run, train.deterministic", train={**SHORT, "deterministic": True}),
    "exact-killed": Experiment(
        "the same, all processes killed, run again",
        train={**SHORT, "deterministic": True},
        kill="all",
        after_step=20,
    ),
    "exact-pair": Experiment("deterministic on two GPUs", nproc=2, train={**SHORT, "deterministic": True}),
    "exact-pair-killed": Experiment(
        "the same, one worker killed",
        nproc=2,
        train={**SHORT, "deterministic": True},
        kill="worker",
        after_step=20,
    ),
}


def run(name: str, tokens: Path, out: Path) -> None:
    """Run one experiment and keep its figures and curves in `out`/name.json."""
    experiment = EXPERIMENTS[name]
    folder = out / "work" / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "tokens").symlink_to(tokens.resolve())
    values = read(ROOT / "params.yaml")
    values |= {"scale": "short", "norm": experiment.norm}
    values["short"]["train"] |= experiment.train
    values["short"]["hardware"] |= {"nproc": experiment.nproc, "threads": os.cpu_count()}
    (folder / "params.yaml").write_text(json.dumps(values))
    started = time.perf_counter()
    process = launch(folder, experiment.nproc)
    killed_at = disturb(process, folder, experiment) if experiment.kill else None
    if experiment.kill == "all":
        process = launch(folder, experiment.nproc)
    if process.wait() != 0:
        raise SystemExit(f"{name} failed:\n{(folder / 'log.txt').read_text()[-6000:]}")
    log = (folder / "log.txt").read_text()
    write_json(
        out / f"{name}.json",
        {
            "says": experiment.says,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "killed_at_step": killed_at,
            "resumed": [line.split()[-1] for line in log.splitlines() if "resuming after step" in line],
            "seconds": time.perf_counter() - started,
            "sha256": hashlib.sha256((folder / "models/gpt2/model.safetensors").read_bytes()).hexdigest(),
            "metrics": read_json(folder / "metrics/train.json"),
            "speed": read_json(folder / "metrics/speed/train.json"),
            **{table: (folder / f"plots/train/{table}.csv").read_text() for table in ("train", "eval", "layers")},
        },
    )
    shutil.rmtree(folder)


def launch(folder: Path, nproc: int) -> subprocess.Popen:
    """Start the stage's command; its output goes to log.txt."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "--max-restarts=1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("DVC_ROOT", "DVC_STAGE")}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, "-m", *torchrun, "-m", "stages.train"]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def disturb(process: subprocess.Popen, folder: Path, experiment: Experiment) -> int:
    """Kill what `experiment` says once its checkpoint is there; return the step that the run had come to."""
    checkpoint = f".scratch/train/*/step_{experiment.after_step:08d}.safetensors"
    while not [*folder.glob(checkpoint)]:
        if process.poll() is not None:
            raise SystemExit(f"ended before its checkpoint:\n{(folder / 'log.txt').read_text()[-6000:]}")
        time.sleep(0.05)
    # A few steps beyond the checkpoint, which the resumed run has to take again.
    time.sleep(3)
    family = psutil.Process(process.pid).children(recursive=True)
    step = read_json(next(folder.glob(".scratch/train/*/heartbeat.json")))["step"]
    if experiment.kill == "all":
        for member in [psutil.Process(process.pid), *family]:
            member.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family)
    else:
        [member for member in family if "stages.train" in member.cmdline()][-1].send_signal(signal.SIGKILL)
    return step


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS)
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        run(name, arguments.tokens, arguments.out)
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    with reporting("bench.gpu"):
        main(sys.argv[1:])
