"""Head similarity: the whole study, and its patterns compared with transformers' whole attention maps, in one run.

    python -m bench.heads [TOKENS] [--scale full] [--n_tokens 524288] [--baseline_tokens 16384] [--rounds 3]

The study is what the stage head-similarity measures: all matrices of the model, of the model on shuffled tokens and of
an untrained one. TOKENS is a folder as the stage tokenize writes it; without it the tokens are random. The model has
the shape of the scale and random weights; the time depends on neither. On a GPU if there is one, and then by default
at the scale full, else tiny.

The baseline is the plain way to compare patterns: transformers' GPT-2 with eager attention returns the maps of all
heads of one sequence, T x T each in fp32, and their products with each other are summed. It does a part of one of the
three passes, the patterns with the first key, so it is compared with that pass, on the first of the tokens. The two
take turns, and the fastest round counts, since all else that the machine does can only slow it.

The limit is arithmetic, the products that no pass can leave out: in fp32 the model's, without the classifier; in
float64 queries by keys up to the query's own, and all pairs of heads once, over patterns, outputs and what is written.
Each kind counts at the rate of the machine's fastest large product of its precision. Nothing is counted for
exponentials, norms or memory traffic. On a GPU the latter is given next to it: a pattern is written by the product,
read and written by the softmax and read by the products of pairs, at the rate at which a large tensor is copied.
"""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.hellaswag import time_rounds
from bench.machine import describe_processor, warn_if_busy
from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.circuits import compare_circuits
from gpt2.heads.similarity import HeadsConfig, compare_heads, cosine
from gpt2.heads.study import compare_with_nulls, shuffle_tokens
from gpt2.model.config import GPTConfig
from gpt2.model.dist import setup_device
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_text
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read
from gpt2.pipeline.stage import peak_memory_gib
from gpt2.tokenizer.encodings import load_encoding

RESULTS = Path("bench/results")
BASELINE, OURS = "transformers, eager, whole maps in fp32", "this project, streamed in float64"
# Edges of the cubes whose product gives the peak, and bytes of the tensor whose copy gives the bandwidth.
PEAK_EDGE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = 2**32


class Limits(NamedTuple):
    """What the machine can do: FLOP/s of large products, and bytes read and written per second (0 where not known)."""

    fp32: float
    fp64: float
    bandwidth: float


class Work(NamedTuple):
    """Operations that a part of the study cannot leave out, and bytes of float64 vectors that it moves."""

    fp32: float
    fp64: float
    moved: float

    def seconds(self, limits: Limits) -> float:
        return self.fp32 / limits.fp32 + self.fp64 / limits.fp64


def count_pass(config: GPTConfig, n_tokens: int, outputs: bool) -> Work:
    """One call of compare_heads."""
    C, T, D, heads = config.n_embd, config.block_size, config.head_dim, sum(config.layer_heads)
    keys, pairs = (T + 1) / 2, heads * (heads + 1) / 2
    model = 2 * 12 * config.n_layer * C**2 + 2 * 2 * heads * D * keys
    patterns, moved = 2 * heads * D * keys + 2 * pairs * keys, 4 * 8 * heads * keys
    if outputs:
        patterns += 2 * heads * D * C + 2 * pairs * (D + C)
        moved += 2 * 8 * heads * C
    return Work(n_tokens * model, n_tokens * patterns, n_tokens * moved)


def count_circuits(config: GPTConfig) -> Work:
    """One call of compare_circuits: four products of all heads, of which pairs count once."""
    channels = sum(config.layer_heads) * config.head_dim
    return Work(0, 4 * channels * (channels + config.head_dim) * config.n_embd, 0)


def measure_limits(device: torch.device) -> Limits:
    peaks = [_fastest(_cube(dtype, device), device) for dtype in (torch.float32, torch.float64)]
    bandwidth = 0.0
    if device.type == "cuda":
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
        into = torch.empty_like(source)
        bandwidth = 2 * COPIED_BYTES / _fastest(lambda: into.copy_(source), device)
    fp32, fp64 = (2 * PEAK_EDGE[device.type] ** 3 / seconds for seconds in peaks)
    return Limits(fp32, fp64, bandwidth)


def _cube(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    a, b = torch.randn(2, PEAK_EDGE[device.type], PEAK_EDGE[device.type], dtype=dtype, device=device)
    return lambda: a @ b


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten runs."""
    best = float("inf")
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_baseline(model: GPT) -> Callable[[Tensor], np.ndarray] | None:
    """The cosines of the patterns (M, M) over token ids from transformers' maps; None where it is not installed."""
    try:
        from tests.reference import make_reference
    except ImportError as error:
        sys.stderr.write(f"bench.heads: {error}; the baseline is left out\n")
        return None
    device = model.wte.weight.device
    reference = make_reference(model).to(device)

    @torch.no_grad()
    def compare(idx: Tensor) -> np.ndarray:
        gram = torch.zeros(2 * [sum(model.config.layer_heads)], device=device)
        for sequence in idx.to(device).split(1):
            maps = reference.transformer(sequence, output_attentions=True, use_cache=False).attentions
            flat = torch.cat(maps, dim=1).flatten(0, 1).flatten(1)
            gram += flat @ flat.t()
        return cosine(gram.double().cpu().numpy())

    return compare


def read_tokens(folder: Path | None, block_size: int, n_tokens: int, vocab_size: int) -> Tensor:
    """Token ids (N, T) of the validation split, or random ones."""
    if folder:
        return spread_windows(TokenSet(folder, "val"), block_size, n_tokens)[:, :-1]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (max(1, n_tokens // block_size), block_size), generator=generator)


def tabulate(seconds: dict[str, float], work: dict[str, Work], limits: Limits) -> str:
    """A Markdown table of the whole and its parts with the limit of each and the share that is reached."""
    lines = ["| | seconds | limit (s) | of the limit |", "|---|--:|--:|--:|"]
    for name, taken in seconds.items():
        limit = work[name].seconds(limits)
        lines.append(f"| {name} | {taken:.2f} | {limit:.2f} | {100 * limit / taken:.0f} % |")
    return "\n".join(lines)


def tabulate_baseline(seconds: dict[str, float], n_tokens: int, memory: dict[str, float]) -> str:
    lines = ["| | tokens | seconds | ratio | peak memory (GiB) |", "|---|" + "--:|" * 4]
    for name, taken in seconds.items():
        ratio = seconds[BASELINE] / taken
        lines.append(f"| {name} | {n_tokens:,} | {taken:.2f} | {ratio:.2f} | {memory[name]:.2f} |")
    return "\n".join(lines)


def measure_memory(run: Callable[[], object], device: torch.device) -> float:
    """GiB held at most while it runs: on a GPU of its memory, else of the process so far."""
    if device.type == "cpu":
        run()
        return peak_memory_gib()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def main(argv: Sequence[str]) -> None:
    scale = "full" if torch.cuda.is_available() else "tiny"
    parser = Parser(prog="python -m bench.heads", description=__doc__.splitlines()[0])
    parser.add_argument(
        "tokens", type=Path, nargs="?", help="a folder as the stage tokenize writes it (default: random)"
    )
    parser.add_argument("--scale", default=scale, help="whose model, batches and amount (default here: %(default)s)")
    parser.add_argument("--n_tokens", type=int, help="default: heads.n_tokens of the scale")
    parser.add_argument("--baseline_tokens", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.tokens and not (options.tokens / "val.json").is_file():
        raise SystemExit(f"bench.heads: {options.tokens}/val.json does not exist; run make repro, or leave TOKENS out")
    warn_if_busy()
    values = {**read(), "scale": options.scale}
    hardware, config = load("hardware", HardwareConfig, values), load("heads", HeadsConfig, values)
    device = setup_device(hardware)
    shape = load("model", GPTConfig, values, norm="preln", vocab_size=load_encoding().n_vocab)
    model = GPT(shape).to(device).eval()
    idx = read_tokens(options.tokens, shape.block_size, options.n_tokens or config.n_tokens, shape.vocab_size)
    few = idx[: max(1, options.baseline_tokens // shape.block_size)]

    def study() -> dict[str, np.ndarray]:
        return compare_with_nulls(model, idx, config)

    def patterns(rows: Tensor) -> np.ndarray:
        return compare_heads(model, rows, config.batch_size, outputs=False)["pattern"]

    text, alone = (count_pass(shape, idx.numel(), outputs) for outputs in (True, False))
    circuits = count_circuits(shape)
    runs = {
        "the whole study": (study, Work(*map(sum, zip(text, *2 * [alone], *2 * [circuits], strict=True)))),
        "the model on text, patterns and outputs": (lambda: compare_heads(model, idx, config.batch_size), text),
        "a null model, patterns alone": (lambda: patterns(shuffle_tokens(idx, config.seed)), alone),
        "circuits of one model": (lambda: compare_circuits(model), circuits),
    }
    memory = {OURS: measure_memory(lambda: patterns(few), device)}
    whole_memory = measure_memory(lambda: compare_with_nulls(model, few, config), device)
    seconds = time_rounds({name: run for name, (run, _) in runs.items()}, options.rounds, device)
    limits, work = measure_limits(device), {name: amount for name, (_, amount) in runs.items()}
    comparison = ""
    if baseline := build_baseline(model):
        plain = time_rounds({BASELINE: lambda: baseline(few), OURS: lambda: patterns(few)}, options.rounds, device)
        memory[BASELINE] = measure_memory(lambda: baseline(few), device)
        difference = abs(baseline(few) - patterns(few)).max()
        comparison = (
            f"\n\n{tabulate_baseline(plain, few.numel(), memory)}\n\nBoth measure the cosines of the patterns on text; "
            f"the largest difference between them is {difference:.1e}."
        )
    on_cpu = f"{describe_processor()}, {hardware.threads} threads"
    processor = on_cpu if device.type == "cpu" else torch.cuda.get_device_name()
    whole = work["the whole study"]
    traffic = (
        f" Moving the float64 vectors of the whole study takes {whole.moved / limits.bandwidth:.2f} s more at "
        f"{limits.bandwidth / 1e12:.2f} TB/s."
        if limits.bandwidth
        else ""
    )
    source = "validation" if options.tokens else "random"
    arguments = (
        f"--scale {options.scale} --n_tokens {idx.numel()} --baseline_tokens {options.baseline_tokens} "
        f"--rounds {options.rounds}"
    )
    page = (
        f"# Head similarity: the whole study\n\n{date.today()}, {processor}, torch {torch.__version__}; the "
        f"{model.n_params() / 1e6:.1f}M parameters of the scale {options.scale}, {sum(shape.layer_heads)} heads, "
        f"{idx.numel():,} {source} tokens in windows of {shape.block_size}, {config.batch_size} at a time; the fastest "
        f"of {options.rounds} interleaved rounds after a warm-up.\n\n```\npython -m bench.heads"
        f"{' TOKENS' * bool(options.tokens)} {arguments}\n```\n\n{tabulate(seconds, work, limits)}\n\n"
        f"Limit: products at {limits.fp32 / 1e12:.2f} (fp32) and {limits.fp64 / 1e12:.2f} TFLOP/s (float64), as "
        f"measured.{traffic} Peak memory of the study: {whole_memory:.2f} GiB.{comparison}\n"
    )
    write_text(RESULTS / f"heads_{device.type}.md", page)
    print(page)


if __name__ == "__main__":
    with reporting("bench.heads"):
        main(sys.argv[1:])
