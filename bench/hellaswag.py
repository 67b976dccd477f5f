"""HellaSwag: the scorer of this project next to the loop of build-nanogpt, on the same model and items in one run.

    python -m bench.hellaswag [--items hellaswag_val.jsonl.gz] [--scale tiny] [--loop_items 300] [--rounds 3]

The loop takes one item at a time: it encodes context and endings, pads the four rows to one length, computes the logits
of all their tokens and the cross-entropy of all of these, and keeps the endings'. It runs on LOOP_ITEMS items spread
evenly over the file and the scorer on the same ones; they take turns, and the fastest round counts, since all else that
the machine does can only slow it. Then the scorer takes all items once. Encoding is part of the loop's time and not of
the scorer's, which reads what the stage tokenize wrote. In how many endings they differ is said below the table.

The limit is arithmetic: two operations per weight of a matrix product for each token read once and, in the classifier,
for each token of an ending, at the rate of the machine's fastest large product. Nothing is counted for attention,
padding, softmax, norms or memory traffic.

The model has the shape of the scale and random weights; the time does not depend on them. On a GPU if there is one.
"""

import operator
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.machine import describe_processor, warn_if_busy
from gpt2.hellaswag.items import ENDINGS, ITEMS, Benchmark, read_items, tokenize_items
from gpt2.hellaswag.scoring import HellaswagConfig, cut_items, evaluate_benchmark
from gpt2.model.config import GPTConfig
from gpt2.model.dist import setup_device
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_text
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read
from gpt2.tokenizer.encodings import load_encoding

PROTOCOL = "completion"
LOOP, SCORER = "build-nanogpt's loop", "this project's scorer"
RESULTS = Path("bench/results")
# Edges of the cubes whose product gives the peak.
PEAK_EDGE = {"cpu": 2048, "cuda": 8192}
Run = Callable[[], object]


@torch.no_grad()
def choose_one_by_one(model: GPT, items: Sequence[dict], device: torch.device) -> dict[str, list[int]]:
    """The loop: endings chosen by sum and by mean over the tokens of the ending."""
    encode = load_encoding().encode_ordinary
    chosen: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for item in items:
        context, endings = encode(item["ctx"]), [encode(f" {ending}") for ending in item["endings"]]
        width = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(ENDINGS, width, dtype=torch.long), torch.zeros(ENDINGS, width)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits, targets = model(tokens)[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ENDINGS, -1)
        sums = (losses * mask[:, 1:]).sum(1)
        chosen["acc"].append(int(sums.argmin()))
        chosen["acc_norm"].append(int((sums / mask[:, 1:].sum(1)).argmin()))
    return chosen


def time_rounds(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of the fastest round of each run; they take turns, after a warm-up where there are several rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + (rounds > 1)):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
            sys.stderr.write(f"{name}: {times[name][-1]:.2f} s\n")
    return {name: min(seconds[rounds > 1 :]) for name, seconds in times.items()}


def measure_peak(device: torch.device) -> float:
    """FLOP/s of a large fp32 product as the classifier takes it; see gpt2.model.loss."""
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    edge, best = PEAK_EDGE[device.type], float("inf")
    a, b = torch.randn(edge, edge, device=device), torch.randn(edge, edge, device=device)
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    if device.type == "cpu":
        torch.set_float32_matmul_precision("highest")
    return 2 * edge**3 / best


def count_operations(model: GPT, benchmark: Benchmark) -> float:
    """Of the products that no scorer can leave out, for all items."""
    rows, config = benchmark.protocols[PROTOCOL], model.config
    tokens = sum(item.tokens for item in cut_items(rows, config.block_size))
    in_blocks = sum(p.numel() for block in model.h for name, p in block.named_parameters() if p.dim() == 2)
    return 2.0 * (tokens * in_blocks + rows.ending_tokens.sum() * config.vocab_size * config.n_embd)


def tabulate(seconds: dict[str, tuple[int, float]]) -> str:
    """A Markdown table of items and seconds, with the ratio of each row's rate to the first one's."""
    base = next(total / items for items, total in seconds.values())
    lines = ["| | items | seconds | ms an item | ratio |", "|---|" + "--:|" * 4]
    for name, (items, total) in seconds.items():
        each = total / items
        lines.append(f"| {name} | {items:,} | {total:.2f} | {1000 * each:.2f} | {base / each:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m bench.hellaswag", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=Path, default=ITEMS, help="JSONL or JSONL.gz (default: %(default)s)")
    parser.add_argument("--scale", default="tiny", help="whose model and batches (default: %(default)s)")
    parser.add_argument("--loop_items", type=int, default=300, help="for the loop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args(argv)
    if not options.items.is_file():
        raise SystemExit(f"bench.hellaswag: {options.items} does not exist; run make repro, or give --items a file")
    warn_if_busy()
    values = {**read(), "scale": options.scale}
    hardware = load("hardware", HardwareConfig, values)
    batch_tokens = load("hellaswag", HellaswagConfig, values).batch_tokens
    device = setup_device(hardware)
    shape = load("model", GPTConfig, values, norm="preln", vocab_size=load_encoding().n_vocab)
    # As long as the longest item, which the loop cannot cut.
    model = GPT(shape.model_copy(update={"block_size": 1024})).to(device).eval()
    items = list(read_items(options.items))
    some = items[:: max(1, len(items) // options.loop_items)][: options.loop_items]
    every, few = (tokenize_items(chosen, load_encoding()) for chosen in (items, some))

    def score(benchmark: Benchmark) -> dict[str, list]:
        return evaluate_benchmark(model, benchmark, PROTOCOL, batch_tokens)[1]

    runs: dict[str, Run] = {LOOP: lambda: choose_one_by_one(model, some, device), SCORER: lambda: score(few)}
    fastest = time_rounds(runs, options.rounds, device)
    seconds = {name: (len(some), best) for name, best in fastest.items()}
    seconds[f"{SCORER}, all items"] = (len(items), time_rounds({"all": lambda: score(every)}, 1, device)["all"])
    scored, looped = score(few), choose_one_by_one(model, some, device)
    other = [sum(map(operator.ne, scored[f"{PROTOCOL}_{kind}"], looped[kind])) for kind in ("acc", "acc_norm")]
    limit, whole = count_operations(model, every) / measure_peak(device), seconds[f"{SCORER}, all items"][1]
    on_cpu = f"{describe_processor()}, {hardware.threads} threads"
    processor = on_cpu if device.type == "cpu" else torch.cuda.get_device_name()
    arguments = f"--scale {options.scale} --loop_items {options.loop_items} --rounds {options.rounds}"
    text = (
        f"# HellaSwag: the scorer next to build-nanogpt's loop\n\n{date.today()}, {processor}, torch "
        f"{torch.__version__}; the {model.n_params() / 1e6:.1f}M parameters of the scale {options.scale}, fp32, "
        f"{batch_tokens} tokens a batch, protocol {PROTOCOL}; the fastest of {options.rounds} interleaved rounds after "
        f"a warm-up, all items once.\n\n```\npython -m bench.hellaswag --items FILE {arguments}\n```\n\n"
        f"{tabulate(seconds)}\n\nThe two choose {other[0]} endings differently by acc, {other[1]} by acc_norm.\n\n"
        f"Limit on all items: {limit:.2f} s of products at the measured peak, {100 * limit / whole:.0f} % of the "
        f"scorer's time.\n"
    )
    write_text(RESULTS / f"hellaswag_{device.type}.md", text)
    print(text)


if __name__ == "__main__":
    with reporting("bench.hellaswag"):
        main(sys.argv[1:])
