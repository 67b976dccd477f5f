"""A folder in which the stages train and norm-study can run: English text as bytes, a model of a few thousand weights.

A run is started as a user starts it, in processes of its own, or, to save the seconds of importing torch, in this one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import psutil
import pytest
import tiktoken
import torch

from gpt2.data.shards import Vocabulary, write_split
from gpt2.hellaswag.items import save_benchmark, tokenize_items
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.pipeline import params
from gpt2.train.loop import TrainConfig
from gpt2.train.setup import Run, build_run
from stages import train
from tests.analysed import SECTIONS as ANALYSED
from tests.closure import ROOT
from tests.settings import HARDWARE

BYTES = tiktoken.Encoding(
    "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
)
VOCABULARY = Vocabulary(encoding="bytes", vocab_size=257, eot_token=256)
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
ADAM = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
SECTIONS = {
    "hardware": HARDWARE,
    "model": SHAPE,
    "train": {
        **ADAM, "seed": 1337, "max_steps": 120, "epochs": None, "tokens_per_step": 128, "micro_batch": 2,
        "precision": "float32", "compile": False, "deterministic": False, "max_lr": 2e-3, "min_lr": 2e-4,
        "warmup_steps": 10, "eval_interval": 25, "checkpoint_interval": 8, "log_interval": 20, "eval_tokens": 500,
        "eval_items": 5,
    },
    "hellaswag": {"batch_tokens": 64},
    "heads": ANALYSED["heads"],
    "prune": {**ANALYSED["prune"], "shares": [0.25, 0.5]},
    "replicates": {"seeds": [1, 2]},
    "norm_study": {
        **SHAPE, **ADAM, "norms": ["preln", "postln", "deepnorm"],
        "arms": {
            "main": {"optimizer": "adamw", "tied": True, "max_lrs": [5e-3, 1e5], "warmup_steps": [5], "seeds": [1, 2]},
        },
        "max_steps": 40, "min_lr_fraction": 0.1, "batch_windows": 4, "micro_batch": 4, "precision": "float32",
        "train_tokens": 1000, "eval_tokens": 200,
    },
}  # fmt: skip
ENDINGS = (
    ["a value.", "the sun.", "of rain", "three"],
    ["is read.", "he sang", "blue", "no more of it"],
    ["an error.", "an egg", "at noon", "below"],
    ["a class.", "a boat", "and sea", "why not"],
    ["or None.", "nor he", "to town", "in May"],
    ["a string.", "a tree", "of wood", "again"],
)
CONTEXTS = ("It returns", "The name", "This raises", "It defines", "It is a number", "The result is")

LOCAL = Dist(0, 0, 1, torch.device("cpu"))


def prepare_folder(folder: Path, norm: str = "preln", train_bytes: int = 8000, **changed: dict) -> Path:
    """Write tokens of Python's manual, a benchmark, and a params.yaml with `changed` keys of sections."""
    text = "\n".join(topics.values()).encode()
    tokens = folder / "data" / "tokens"
    splits = {"train": text[4000 : 4000 + train_bytes], "val": text[:4000], "test": text[-4000:]}
    for split, part in splits.items():
        documents = [part[start : start + 1000] for start in range(0, len(part), 1000)]
        ids = [np.array([VOCABULARY.eot_token, *document], dtype=np.uint16) for document in documents]
        pairs = zip(ids, map(len, documents), strict=True)
        write_split(tokens, split, pairs, VOCABULARY, shard_tokens=3000)
    items = [
        {"activity_label": "Manual", "ctx_a": ctx, "ctx_b": "", "ctx": ctx, "endings": endings, "label": i % 2}
        for i, (ctx, endings) in enumerate(zip(CONTEXTS, ENDINGS, strict=True))
    ]
    save_benchmark(tokenize_items(items, BYTES), tokens / "hellaswag.npz")
    set_params(folder, norm, **changed)
    return folder


def set_params(folder: Path, norm: str = "preln", **changed: dict) -> None:
    """Write params.yaml, which JSON is too."""
    sections = {name: {**section, **changed.get(name, {})} for name, section in SECTIONS.items()}
    (folder / "params.yaml").write_text(json.dumps({"norm": norm, "scale": "tiny", "tiny": sections}))


def load_parts(folder: Path) -> Run:
    """The run of a folder in one process, as the stage makes it."""
    values = params.read(folder / "params.yaml")
    shape = params.load("model", GPTConfig, values, norm=values["norm"], vocab_size=VOCABULARY.vocab_size)
    batch_tokens = params.load("hellaswag", HellaswagConfig, values).batch_tokens
    return build_run(params.load("train", TrainConfig, values), shape, batch_tokens, folder / "data/tokens", LOCAL)


def start(
    folder: Path, processes: int = 1, module: str = "stages.train", restarts: int = 0, code: Path = ROOT
) -> subprocess.Popen:
    """Start a stage of the checkout `code` in `folder`, two or more processes under torchrun. It writes to log.txt."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    launcher = ["-m", *torchrun] if processes > 1 else []
    given = {key: value for key, value in os.environ.items() if key not in ("DVC_ROOT", "DVC_STAGE")}
    # As in dvc.yaml.
    env = {**given, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", module], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen, folder: Path) -> str:
    """Wait for the process to succeed; return what it wrote."""
    code = process.wait(timeout=300)
    log = (folder / "log.txt").read_text()
    assert code == 0, log
    return log


def train_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    train.main()


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, after_step: int = 0, count: int = 1) -> int:
    """Return the step of the newest checkpoint as soon as there are `count` of steps beyond `after_step`."""
    deadline = time.monotonic() + 300
    while True:
        steps = [step for step in checkpoint_steps(folder) if step > after_step]
        if len(steps) >= count:
            return steps[-1]
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL the process and all it started at once, the launcher's workers included, and wait until they are gone."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    # Stopped first, so that none does anything about the death of another.
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for member in family:
            member.send_signal(sent)
    process.wait()
    psutil.wait_procs(family)


def scratch_of(folder: Path) -> Path:
    """The one scratch folder."""
    (scratch,) = (folder / ".scratch" / "train").iterdir()
    return scratch


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    paths = (folder / ".scratch" / "train").glob("*/step_*.safetensors")
    return sorted(int(path.stem.removeprefix("step_")) for path in paths)


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run must reproduce bit for bit."""
    names = [f"models/gpt2/{name}" for name in ("model.safetensors", "config.json")]
    names += [f"plots/train/{name}.csv" for name in ("train", "eval", "layers")]
    return {name: (folder / name).read_bytes() for name in (*names, "metrics/train.json")}


def read_table(path: Path) -> np.ndarray:
    """Numbers of a CSV file below its header."""
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
