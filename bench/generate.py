"""Generation: this project next to nanoGPT's sampler, at GPT-2's own size with random weights.

    python -m bench.generate --nanogpt DIR        # DIR holds nanoGPT's model.py

Both continue one prompt of PROMPT tokens in SEQUENCES sequences by TOKENS tokens, with temperature 0.8 and top_k 50, on
a GPU if there is one, else with as many threads as hardware.threads says. This project computes in fp32, on a GPU with
TF32 where torch multiplies, for the prompt and the logits; nanoGPT on a CPU too, on a GPU under bfloat16 autocast as in
its sample.py. This project generates all of it, ROUNDS times. nanoGPT keeps no keys and values: every token costs a
pass over the whole text, whose time depends on the length of the text alone. So one token of its sampler is timed at
SAMPLED lengths from the first to the last, once in each of the same rounds, and its whole time is the sum over all
lengths of the line between them. The page says so.

The fastest round counts; the median is shown next to it. The limit is arithmetic: no step can take less time than
reading all weights once, at the rate at which the machine reads memory (the fastest sum over an array of
BANDWIDTH_BYTES). Keys and values, which are read as well, are not counted, so that 100 % is out of reach.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

# Threads that spin while they wait for each other slow a step of the cache tenfold as soon as another process works.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import torch
from torch import nn

from bench.baseline import ask_for_nanogpt, import_nanogpt
from bench.machine import describe_processor, warn_if_busy
from gpt2.model.config import GPTConfig
from gpt2.model.dist import autocast, setup_device
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import reporting
from gpt2.pipeline.files import write_json, write_text
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read
from gpt2.sampling.sampling import SamplingConfig, draw_tokens

RESULTS = Path("bench/results")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
SHAPE: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
VOCAB_SIZE = 50257
PROMPT, SEQUENCES, TOKENS, ROUNDS = 8, 5, 500, 3
# Lengths of the text at which a token of nanoGPT is timed.
SAMPLED = (8, 64, 128, 192, 256, 320, 384, 448, 507)
BANDWIDTH_BYTES = 2**29
NEVER = -1


def time_ours(model: GPT, prompt: torch.Tensor) -> float:
    """Seconds for all tokens of all sequences."""
    sampling = SamplingConfig(max_tokens=TOKENS, num_seq=SEQUENCES)
    started = time.perf_counter()
    drawn = sum(len(tokens) for tokens in draw_tokens(model, prompt, sampling, NEVER))
    seconds = time.perf_counter() - started
    assert drawn == SEQUENCES * TOKENS, drawn
    return seconds


def time_nanogpt(model: Any, length: int) -> float:
    """Seconds for the next token of all sequences after a text of `length` tokens."""
    device, sampling = model.lm_head.weight.device, SamplingConfig()
    idx = torch.randint(VOCAB_SIZE, (1, length), device=device).expand(SEQUENCES, -1)
    started = time.perf_counter()
    with autocast(device, "bfloat16" if device.type == "cuda" else "float32"):
        # Read, so that a GPU has finished.
        model.generate(idx, 1, temperature=sampling.temperature, top_k=sampling.top_k)[:, -1].tolist()
    return time.perf_counter() - started


def build_nanogpt(checkout: Path) -> nn.Module:
    nanogpt = import_nanogpt(checkout)
    # The padded vocabulary of its own train.py.
    return nanogpt.GPT(nanogpt.GPTConfig(**SHAPE, vocab_size=50304, dropout=0.0, bias=True)).eval()


def measure_bandwidth(device: torch.device) -> float:
    """Bytes read per second, in the fastest of ten sums."""
    array, fastest = torch.zeros(BANDWIDTH_BYTES // 4, device=device), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        array.sum().item()
        fastest = min(fastest, time.perf_counter() - started)
    return BANDWIDTH_BYTES / fastest


def bytes_per_step(model: GPT) -> int:
    """All weights but the positions, of which a step reads one row, and the padding of the vocabulary."""
    return 4 * (model.n_params() - model.wpe.weight.numel())


def measure(nanogpt: Path | None) -> dict:
    """Interleaved rounds of all rows, after a warm-up of each."""
    load_before = os.getloadavg()[0]
    hardware = load("hardware", HardwareConfig, {**read(), "scale": "tiny"})
    device = setup_device(hardware)
    ours = GPT(GPTConfig(**SHAPE, vocab_size=VOCAB_SIZE, norm="preln")).eval().to(device)
    theirs = build_nanogpt(nanogpt).to(device) if nanogpt else None
    prompt = torch.randint(VOCAB_SIZE, (PROMPT,))
    list(draw_tokens(ours, prompt, SamplingConfig(max_tokens=3, num_seq=SEQUENCES), NEVER))
    seconds: list[float] = []
    sampled: list[tuple[int, list[float]]] = [(length, []) for length in SAMPLED if theirs]
    if theirs:
        time_nanogpt(theirs, SAMPLED[0])
    bandwidth = []
    for number in range(ROUNDS):
        bandwidth.append(measure_bandwidth(device))
        seconds.append(time_ours(ours, prompt))
        for length, taken in sampled:
            taken.append(time_nanogpt(theirs, length))
        sys.stderr.write(f"round {number + 1} of {ROUNDS}: {seconds[-1]:.1f} s\n")
    return {
        "day": date.today().isoformat(), "load": load_before, "torch": torch.__version__,
        "device": device.type, "processor": describe_device(device, hardware.threads),
        "bytes_per_step": bytes_per_step(ours), "bytes_per_s": bandwidth,
        "ours_s": seconds, "nanogpt_s_at_length": sampled,
    }  # fmt: skip


def describe_device(device: torch.device, threads: int) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{describe_processor()}, {threads} threads"


def whole_time(sampled: Sequence[tuple[int, list[float]]], pick: Callable[[Sequence[float]], float]) -> float:
    """Seconds of nanoGPT for TOKENS tokens, from those of one token at some lengths of the text."""
    lengths, seconds = zip(*sampled, strict=True)
    every = np.arange(PROMPT, PROMPT + TOKENS)
    return float(np.interp(every, lengths, [pick(taken) for taken in seconds]).sum())


def tabulate(data: dict) -> str:
    """The page of a measurement."""
    drawn = SEQUENCES * TOKENS
    limit = SEQUENCES * max(data["bytes_per_s"]) / data["bytes_per_step"]
    rows = [("this project", min(data["ours_s"]), median(data["ours_s"]))]
    if sampled := data["nanogpt_s_at_length"]:
        rows.append(("nanoGPT, interpolated", whole_time(sampled, min), whole_time(sampled, median)))
    lines = [
        f"# Generation on a {DEVICES[data['device']]}\n\n{data['day']}, {data['processor']}, "
        f"torch {data['torch']}; GPT-2 (124M) with random weights, {SEQUENCES} sequences of {TOKENS} tokens after a "
        f"prompt of {PROMPT}; the fastest of {len(data['ours_s'])} interleaved rounds, on a machine with a load of "
        f"{data['load']:.1f} before.\n",
        f"```\npython -m bench.generate{' --nanogpt DIR' if sampled else ''}\n```\n",
        "| | tokens/s | median round | seconds in all | ratio to nanoGPT | of the limit |\n|---|" + "--:|" * 5,
    ]
    for name, fastest, middle in rows:
        ratio = f"{rows[-1][1] / fastest:.1f}" if sampled else "–"
        lines.append(
            f"| {name} | {drawn / fastest:,.1f} | {drawn / middle:,.1f} | {fastest:,.1f} | {ratio} | "
            f"{100 * drawn / fastest / limit:.1f} % |"
        )
    lines.append(
        f"\nLimit: {limit:,.0f} tokens/s, {SEQUENCES} for each {data['bytes_per_step'] / 1e6:.0f} MB of weights read "
        f"at {max(data['bytes_per_s']) / 1e9:.1f} GB/s."
    )
    if sampled:
        times = ", ".join(f"{length}: {min(seconds):.3g}" for length, seconds in sampled)
        lines.append(
            f"\nnanoGPT's sampler was run for one token at {len(sampled)} lengths of the text, and its whole time is "
            f"the sum over all {TOKENS} lengths of the line between them. Seconds at each length: {times}."
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    nanogpt = ask_for_nanogpt("python -m bench.generate", __doc__.splitlines()[0], argv)
    warn_if_busy()
    data = measure(nanogpt)
    write_json(RESULTS / f"generate_{data['device']}.json", data)
    write_text(RESULTS / f"generate_{data['device']}.md", tabulate(data))
    print(tabulate(data))


if __name__ == "__main__":
    with reporting("bench.generate"):
        main(sys.argv[1:])
