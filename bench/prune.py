"""Pruning: seconds of the whole frontier, by five criteria at ten shares without repair, part by part.

    python -m bench.prune [--scale tiny] [--rounds 1]

Redundancy, Taylor importance, magnitude, random and greedy loss rank the heads with the tokens and seeds of the scale;
then every set is evaluated on the test tokens, as the stage prune does it. Similarities and tokens are random, and the
model has the shape of the scale and random weights, on which the time does not depend. A set of heads that two criteria
share is evaluated once. The scale is `short` on a GPU, else `tiny`. One pass warms up; the fastest of the rounds
counts.

The limit is arithmetic: two operations per weight of a matrix product for each token that passes it, three times that
for the scores with gradients, and 4 D of each head for each of half the context, at the rate of the machine's fastest
large product. The greedy search counts only the layers from the tried head on. Softmax, norms and memory traffic are
not counted.
"""

import sys
import time
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.hellaswag import measure_peak
from bench.machine import describe_processor, warn_if_busy
from gpt2.heads.similarity import Head, list_heads
from gpt2.model.config import GPTConfig
from gpt2.model.dist import setup_device
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_text
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read
from gpt2.prune.criteria import Order, order_by_score, rank_heads, score_taylor
from gpt2.prune.frontier import PLAIN, Evaluator, measure_frontier
from gpt2.prune.iterative import SHORTLIST, order_by_loss
from gpt2.prune.remove import PruneConfig, count_removals
from gpt2.prune.repair import Calibration
from gpt2.tokenizer.encodings import load_encoding

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
PARTS = ("ranking by the first four", "greedy search by loss", "perplexity of all sets")
GOAL_SECONDS = 180
RESULTS = Path("bench/results")


class Text(NamedTuple):
    """Windows (N, T + 1) for the Taylor scores and the greedy search, and for perplexity."""

    scoring: Tensor
    eval: Tensor


def draw_text(model: GPT, config: PruneConfig) -> Text:
    """Random tokens, as many as the stage reads."""
    T, generator = model.config.block_size, torch.Generator().manual_seed(0)
    return Text(
        *(
            torch.randint(model.config.vocab_size, (count // T, T + 1), generator=generator)
            for count in (config.scoring_tokens, config.eval_tokens)
        )
    )


def draw_similarity(n_heads: int) -> np.ndarray:
    """Random cosines (M, M)."""
    values = np.random.default_rng(0).random((n_heads, n_heads))
    return (values + values.T) / 2


def measure(
    model: GPT, config: PruneConfig, text: Text
) -> tuple[dict[str, float], dict[str, list[Order]], Sequence[Tensor]]:
    """Seconds of each of PARTS in one round, the orders, and the Taylor scores."""
    similarity, counts = draw_similarity(len(list_heads(model.config))), count_removals(model, SHARES)
    times = [_now()]
    taylor = score_taylor(model, text.scoring, config.batch_size)
    orders = rank_heads(model, similarity, taylor, config.random_seeds)
    times.append(_now())
    orders["loss"] = [order_by_loss(model, taylor, text.scoring, counts[-1], config.batch_size)]
    times.append(_now())
    # Without repairs the calibration is not used.
    evaluator = Evaluator(model, Calibration(text.eval, 1, 1.0, similarity, []), text.eval, config.batch_size)
    measure_frontier(evaluator, orders, counts, PLAIN)
    times.append(_now())
    seconds = dict(zip(PARTS, np.diff(times).tolist(), strict=True))
    sys.stderr.write("".join(f"{part}: {taken:.1f} s\n" for part, taken in seconds.items()))
    return seconds, orders, taylor


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def count_operations(
    model: GPT, text: Text, orders: dict[str, list[Order]], taylor: Sequence[Tensor]
) -> dict[str, float]:
    """The least operations of each of PARTS."""
    config, counts, left = model.config, count_removals(model, SHARES), order_by_score(taylor)
    classifier = 2 * config.n_embd * config.vocab_size
    whole = operations_from(config, 0, set()) + classifier
    search = 0.0
    gone: set[Head] = set()
    for chosen in orders["loss"][0]:
        tries = left[:SHORTLIST]
        search += sum(operations_from(config, tried.layer, gone | {tried}) + classifier for tried in tries)
        left.remove(chosen)
        gone.add(chosen)
    sets = {frozenset(order[:count]) for ranked in orders.values() for order in ranked for count in counts}
    evaluated = sum(operations_from(config, 0, removed) + classifier for removed in sets)
    scoring, test = (windows[:, 1:].numel() for windows in text)
    return dict(zip(PARTS, (3 * whole * scoring, search * scoring, evaluated * test), strict=True))


def operations_from(config: GPTConfig, layer: int, removed: Collection[Head]) -> float:
    """For a token, in the blocks from that of `layer`, without the `removed` heads."""
    C, D, T = config.n_embd, config.head_dim, config.block_size
    # Causal attention reads half of the context on average.
    head, mlp = 2 * 4 * C * D + 4 * D * T / 2, 2 * 8 * C * C
    layers = config.n_layer - layer
    return (layers * config.n_head - sum(gone.layer >= layer for gone in removed)) * head + layers * mlp


def tabulate(seconds: dict[str, float], operations: dict[str, float], peak: float) -> str:
    """A Markdown table of seconds, operations and limit of the parts and of the whole."""
    rows = [*((part, seconds[part], operations[part]) for part in PARTS)]
    rows.append(("all", sum(seconds.values()), sum(operations.values())))
    lines = ["| | seconds | products (TFLOP) | limit (s) | of the limit |", "|---|" + "--:|" * 4]
    for part, taken, count in rows:
        limit = count / peak
        lines.append(f"| {part} | {taken:.1f} | {count / 1e12:,.2f} | {limit:.1f} | {100 * limit / taken:.0f} % |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m bench.prune", description=__doc__.splitlines()[0])
    scale = "short" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--scale", default=scale, help="whose model, tokens and seeds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(argv)
    warn_if_busy()
    values = {**read(), "scale": options.scale}
    hardware, config = load("hardware", HardwareConfig, values), load("prune", PruneConfig, values)
    device = setup_device(hardware)
    shape = load("model", GPTConfig, values, norm="preln", vocab_size=load_encoding().n_vocab)
    model = GPT(shape).to(device).eval()
    text = draw_text(model, config)
    mean_loss(model, text.eval[: config.batch_size], config.batch_size)
    rounds = [measure(model, config, text) for _ in range(options.rounds)]
    seconds = min((taken for taken, *_ in rounds), key=lambda taken: sum(taken.values()))
    table = tabulate(seconds, count_operations(model, text, *rounds[0][1:]), measure_peak(device))
    on_cpu = f"{describe_processor()}, {hardware.threads} threads"
    processor = on_cpu if device.type == "cpu" else torch.cuda.get_device_name()
    seeds, sizes = len(config.random_seeds), [f"{windows[:, 1:].numel():,}" for windows in text]
    goal = f" The goal for GPT-2 (124M) on an H100 is {GOAL_SECONDS} s." if device.type == "cuda" else ""
    page = (
        f"# Pruning: the frontier of five criteria at {len(SHARES)} shares, without repair\n\n{date.today()}, "
        f"{processor}, torch {torch.__version__}; the {model.n_params() / 1e6:.1f}M parameters of the scale "
        f"{options.scale}, fp32{', products in TF32' if device.type == 'cuda' else ''}; {sizes[0]} tokens for the "
        f"Taylor scores and the search, {sizes[1]} for perplexity, {seeds} random orders; the fastest of "
        f"{options.rounds} rounds.\n\n```\npython -m bench.prune --scale {options.scale} --rounds {options.rounds}"
        f"\n```\n\n{table}\n\nThe limit is that of the products at the measured peak.{goal}\n"
    )
    write_text(RESULTS / f"prune_{device.type}.md", page)
    print(page)


if __name__ == "__main__":
    with reporting("bench.prune"):
        main(sys.argv[1:])
