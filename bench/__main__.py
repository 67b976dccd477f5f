"""Training throughput on the CPU: this project next to transformers and nanoGPT, in one run on the same tokens.

    python -m bench [--nanogpt DIR]        # make bench NANOGPT=DIR; DIR holds nanoGPT's model.py

Every row trains the tiny model of params.yaml in fp32 with AdamW and gradient clipping, on the same batches of
data/tokens, with as many threads in all as hardware.threads says. The rows are processes of their own that wait for
their turn; they take turns ROUNDS times, so that a slow minute of the machine meets all of them. The fastest round
counts, since all else that the machine does can only slow a row, and slows most the rows that move most memory; the
median is shown next to it. Memory is the largest resident set of the training processes.

The limit is arithmetic: a token costs 6 operations per weight of a matrix product and 12 L C T for attention, forward
and backward (Chowdhery et al. 2022, "PaLM", appendix B), and no step is faster than these at the rate of the machine's
fastest large fp32 matrix product. The last column is the share of that rate which a row reaches. Nothing is counted for
softmax, norms, GELU, the optimizer or memory traffic, so that 100 % is out of reach: at this shape the classifier over
50,257 ids is seven eighths of the operations, with a depth of 128 channels only.
"""

import json
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from bench.baseline import ask_for_nanogpt
from bench.machine import describe_processor, warn_if_busy
from gpt2.pipeline.command import reporting
from gpt2.pipeline.files import UserError, write_text
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read

ROUNDS, STEPS = 7, 2
# A row that is not ready by then, which only compiling can bring about, is left out.
START_SECONDS = 120
RESULT = Path("bench/results/train_cpu.md")
TOKENS = Path("data/tokens/train.json")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
NANOGPT = "nanoGPT, eager"


class Row:
    """A training process that runs a few steps whenever asked, and what it reported of them."""

    def __init__(self, name: str, launcher: Sequence[str], *arguments: str):
        self.name = name
        self.tokens_per_s: list[float] = []
        self.last: dict[str, Any] = {}
        command = [sys.executable, *launcher, "-m", "bench.train", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def run(self, steps: int, limit_seconds: float | None = None) -> dict[str, Any]:
        """Train `steps` steps; tokens/s, loss of the last one, and peak memory in GiB so far. Empty past the limit."""
        self._orders.write(f"{steps}\n")
        self._orders.flush()
        if not select.select([self._answers], [], [], limit_seconds)[0]:
            self._process.terminate()
            return {}
        line = self._answers.readline()
        if not line:
            raise UserError(
                f"{self.name}: the process ended with status {self._process.wait()}, see its messages above"
            )
        self.last = json.loads(line)
        return self.last

    def measure(self) -> None:
        self.tokens_per_s.append(self.run(STEPS)["tokens_per_s"])

    def stop(self) -> None:
        self._orders.close()
        self._process.wait()


def start_rows(nanogpt: Path | None) -> list[Row]:
    """Start every row and let it warm up, one after the other."""
    wanted: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("this project, 1 process", (), ("ours",)),
        ("this project, torchrun with 2 processes", TORCHRUN, ("ours",)),
        ("transformers GPT2LMHeadModel, eager", (), ("transformers",)),
    ]
    if nanogpt:
        wanted.append((NANOGPT, (), ("nanogpt", str(nanogpt))))
        if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
            wanted.append(("nanoGPT, torch.compile", (), ("nanogpt", str(nanogpt), "--compile")))
        else:
            sys.stderr.write("no C++ compiler: nanoGPT with torch.compile is left out\n")
    rows = []
    for name, launcher, arguments in wanted:
        started = time.monotonic()
        row = Row(name, launcher, *arguments)
        ready = bool(row.run(1, START_SECONDS))
        sys.stderr.write(f"{name}: {'ready' if ready else 'given up'} after {time.monotonic() - started:.0f} s\n")
        rows += [row] * ready
    return rows


def measure_peak() -> dict:
    """GFLOP/s of the fastest large fp32 matrix product, and the operations of one token."""
    command = [sys.executable, "-m", "bench.train", "peak"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tabulate(rows: Sequence[Row], peak: dict) -> str:
    """The Markdown table, with ratios to nanoGPT's eager row, or to transformers' without it."""
    speeds = {row.name: max(row.tokens_per_s) for row in rows}
    base = NANOGPT if NANOGPT in speeds else "transformers GPT2LMHeadModel, eager"
    limit = 1e9 * peak["gflops"] / peak["flops_per_token"]
    lines = [
        f"| | tokens/s | median round | ratio to {base} | peak memory (GiB) | loss | of the limit |",
        "|---|" + "--:|" * 6,
    ]
    for row in rows:
        speed = speeds[row.name]
        lines.append(
            f"| {row.name} | {speed:,.0f} | {median(row.tokens_per_s):,.0f} | {speed / speeds[base]:.2f} | "
            f"{row.last['peak_memory_gib']:.2f} | {row.last['loss']:.3f} | {100 * speed / limit:.0f} % |"
        )
    return "\n".join(lines) + (
        f"\n\nLimit: {limit:,.0f} tokens/s, {peak['gflops']:.0f} GFLOP/s measured over "
        f"{peak['flops_per_token'] / 1e6:.1f} million operations per token."
    )


def describe_run(threads: int, argv: Sequence[str]) -> str:
    command = " ".join(["python -m bench", *argv])
    return (
        f"# Training throughput on the CPU\n\n{date.today()}, {describe_processor()}, {threads} threads; the fastest "
        f"of {ROUNDS} interleaved rounds of {STEPS} steps, after a warm-up.\n\n```\n{command}\n```\n\n"
    )


def main(argv: Sequence[str]) -> None:
    nanogpt = ask_for_nanogpt("python -m bench", __doc__.splitlines()[0], argv)
    if not TOKENS.is_file():
        raise SystemExit(f"bench: {TOKENS} does not exist; run make repro")
    warn_if_busy()
    threads = load("hardware", HardwareConfig, {**read(), "scale": "tiny"}).threads
    peak = measure_peak()
    rows = start_rows(nanogpt)
    for _ in range(ROUNDS):
        for row in rows:
            row.measure()
    for row in rows:
        row.stop()
    # A path of this machine is nobody else's.
    shown = ["--nanogpt DIR"] if nanogpt else []
    text = f"{describe_run(threads, shown)}{tabulate(rows, peak)}\n"
    write_text(RESULT, text)
    print(text)


if __name__ == "__main__":
    with reporting("bench"):
        main(sys.argv[1:])
