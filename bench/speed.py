"""Training speed at GPT-2's size on one GPU: each precision of ours and compiled nanoGPT, in interleaved rounds.

    python -m bench.speed measure TOKENS RESULT.json --nanogpt DIR [--settings ...] [--rounds 3]
    python -m bench.speed table RESULT.json     # bench/results/speed.json and speed.md

TOKENS is a folder as the stage `tokenize` writes it, DIR holds nanoGPT's model.py. Every setting takes the same steps
of 524,288 tokens with the section `short` of params.yaml; a round runs all settings one after another. The kernels of
one more step are then timed by the profiler.
"""

import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from bench.baseline import nanogpt_step
from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import read_json, write_json, write_text
from gpt2.pipeline.params import load, read
from gpt2.train.loop import Stepper, TrainConfig
from gpt2.train.optim import build_optimizer
from gpt2.train.setup import set_precision

RESULT, PAGE = Path("bench/results/speed.json"), Path("bench/results/speed.md")
# Changes to the section `train` of `short`.
SETTINGS: dict[str, dict] = {
    "nanogpt": {},
    "bfloat16_mixed": {"precision": "bfloat16_mixed"},
    "bfloat16": {},
    "bfloat16_64": {"micro_batch": 64},
    "fp8_head": {"fp8": "head"},
    "bfloat16_muon": {"optimizer": "muon"},
}
# Settings by the names of their figures in speed.json.
KEYS = {"nanogpt": "nanogpt", "bf16": "bfloat16", "fp8": "fp8_head"}
# Steps of a round, the first two of them not timed.
WARM_UP, TIMED, ROUNDS = 2, 6, 3
# Dense bf16 peak of an H100 in FLOP/s (data sheet), and what its largest product reaches (8192 x 8192 x 8192).
PEAK, LARGEST_PRODUCT = 989e12, 798e12
MICRO_STEP = 65536


def configure(changes: dict) -> tuple[TrainConfig, GPTConfig]:
    values = {**read(), "scale": "short"}
    values["short"]["train"] |= changes
    return load("train", TrainConfig, values), load("model", GPTConfig, values, norm="preln", vocab_size=50257)


def our_step(changes: dict, tokens: TokenSet) -> Callable[[int], float]:
    """The training step of the project."""
    config, shape = configure(changes)
    order = TrainOrder(tokens, shape.block_size, config.batch_windows(shape.block_size), config.seed)
    dist = Dist(0, 0, 1, torch.device("cuda", 0))
    model = GPT(shape, config.seed).to(dist.device)
    set_precision(model, config)
    stepper = Stepper(model, build_optimizer(model, config), config, order, dist)

    def step(number: int) -> float:
        loss, _ = stepper.backward(number)
        stepper.clip()
        stepper.update(number)
        return loss

    return step


# Parts of a step by the names of their kernels; the first match counts.
KINDS = {
    "loss": ("_kernel", "_fp8_kernel"),
    "attention": ("cudnn", "flash", "fmha"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass"),
    "element-wise and reductions (Inductor)": ("triton_",),
    "optimizer, sums of gradients, copies": ("",),
}


def kind_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to; names with a leading underscore must match as a whole."""
    for kind, parts in KINDS.items():
        if any(kernel == part if part.startswith("_") else part in kernel for part in parts):
            return kind
    raise AssertionError("the last kind takes every kernel")


def profile(step: Callable[[int], float], number: int) -> dict[str, float]:
    """Milliseconds of one step by kind of kernel, and of the GPU idle."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - started)
    kinds = dict.fromkeys(KINDS, 0.0)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kinds[kind_of(event.name)] += event.device_time / 1e3
    return {**kinds, "GPU idle": wall - sum(kinds.values())}


def measure(tokens: TokenSet, settings: list[str], nanogpt: Path, rounds: int) -> dict[str, dict]:
    """Rates in every round, the loss after it, memory, and the parts of a step, by setting."""
    steps = {name: our_step(SETTINGS[name], tokens) for name in settings if name != "nanogpt"}
    if "nanogpt" in settings:
        # Its memory allows no larger micro-batch.
        steps = {"nanogpt": nanogpt_step(nanogpt, *configure({"micro_batch": 64}), tokens), **steps}
    results: dict[str, dict] = {name: {"tokens_per_s": [], "loss": []} for name in steps}
    # The first step compiles.
    for name, step in steps.items():
        step(0)
        print(f"{name}: compiled", flush=True)
    n_tokens, number = configure({})[0].tokens_per_step, 1
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for k in range(WARM_UP):
                step(number + k)
            torch.cuda.synchronize()
            started = time.perf_counter()
            losses = [step(number + WARM_UP + k) for k in range(TIMED)]
            torch.cuda.synchronize()
            results[name]["tokens_per_s"].append(TIMED * n_tokens / (time.perf_counter() - started))
            results[name]["loss"].append(losses[-1])
            results[name]["gib"] = torch.cuda.max_memory_allocated() / 2**30
            print(f"{name}: {results[name]['tokens_per_s'][-1]:,.0f} tokens/s, loss {losses[-1]:.4f}", flush=True)
        number += WARM_UP + TIMED
    for name, step in steps.items():
        results[name]["ms_per_step"] = profile(step, number)
    return results


def tabulate(measured: dict) -> None:
    """Write the page and the figures."""
    settings = measured["settings"]
    shape = configure({})[1]
    flops = training_flops_per_token(shape, shape.vocab_size)
    weights = 12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd
    rates = {name: median(result["tokens_per_s"]) for name, result in settings.items()}
    rows = [
        {
            "Setting": f"`{name}`",
            "Tokens/s": f"{rates[name]:,.0f}",
            "Rounds": f"{min(result['tokens_per_s']):,.0f} to {max(result['tokens_per_s']):,.0f}",
            "× nanoGPT": f"{rates[name] / rates['nanogpt']:.3f}",
            "MFU": f"{flops * rates[name] / PEAK:.1%}",
            "GPU memory (GiB)": f"{result['gib']:.1f}",
            "Loss at the end": f"{result['loss'][-1]:.4f}",
        }
        for name, result in settings.items()
    ]
    scale = MICRO_STEP / configure({})[0].tokens_per_step
    parts = pd.DataFrame({f"`{n}`": r["ms_per_step"] for n, r in settings.items()}) * scale
    limit = 1e3 * 6 * weights * MICRO_STEP / LARGEST_PRODUCT
    write_json(
        RESULT,
        {
            "device": measured["device"],
            "torch": measured["torch"],
            "date": measured["date"],
            **{f"tokens_per_s_{key}": round(rates[name]) for key, name in KEYS.items()},
            **{
                f"ratio_{key}": round(rates[name] / rates["nanogpt"], 4)
                for key, name in KEYS.items()
                if key != "nanogpt"
            },
            "settings": settings,
        },
    )
    page = [
        "# Training GPT-2 (124M) on one GPU",
        f"{measured['device']}, torch {measured['torch']}, {measured['date']}; `python -m bench.speed measure`. All "
        f"settings in one process, {len(settings['nanogpt']['tokens_per_s'])} interleaved rounds of {TIMED} timed "
        "steps of 524,288 tokens; medians. Micro-batches of 128 windows of 1,024 tokens, nanoGPT's of 64. MFU is (6 N "
        f"+ 12 L C T) FLOPs a token, N = {weights:,} weights of matrix products, over {PEAK / 1e12:.0f} TFLOP/s.",
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
        "`bfloat16`: products, activations and residual stream in bfloat16; weights, moments and sums of gradients in "
        "fp32. `fp8_head`: the three products of the output matrix in fp8 as well (`train.fp8: head`).",
        f"## Parts of a micro-step of {MICRO_STEP:,} tokens, in ms",
        parts.rename_axis("Part").to_markdown(floatfmt=".1f"),
        f"The products' {6 * weights * MICRO_STEP / 1e12:.1f} TFLOP in bfloat16 would take {limit:.1f} ms at the rate "
        f"of the largest product ({LARGEST_PRODUCT / 1e12:.0f} TFLOP/s for 8192³, measured).",
    ]
    write_text(PAGE, "\n\n".join(page) + "\n")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("tokens", type=Path)
    measuring.add_argument("result", type=Path)
    measuring.add_argument("--nanogpt", type=Path, required=True)
    measuring.add_argument("--settings", nargs="+", choices=SETTINGS, default=["nanogpt", "bfloat16", "fp8_head"])
    measuring.add_argument("--rounds", type=int, default=ROUNDS)
    actions.add_parser("table").add_argument("result", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.action == "table":
        tabulate(read_json(arguments.result))
        return
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(0)
    settings = measure(TokenSet(arguments.tokens, "train"), arguments.settings, arguments.nanogpt, arguments.rounds)
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": date.today().isoformat()}
    write_json(arguments.result, {**device, "settings": settings})


if __name__ == "__main__":
    with reporting("bench.speed"):
        main(sys.argv[1:])
