"""Recipes for the tiny scale: how well a model learns, and whether what the studies find in it holds for other seeds.

python -m bench.recipes FOLDER [--workers 16] [--recipes muon_4096 adamw_4096]

FOLDER holds a folder of tokens for each vocabulary, as the stage tokenize writes them (bpe_2048, bpe_4096, bpe_8192).
Each model trains in one process with one thread. Rows go to bench/results/recipes.csv as they come.
"""

import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import eval_windows, spread_windows
from gpt2.heads.similarity import Head, HeadsConfig, list_heads
from gpt2.heads.study import study_heads
from gpt2.hellaswag.items import load_benchmark
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.evaluate import window_losses
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.workers import in_order
from gpt2.prune.criteria import rank_heads, score_taylor
from gpt2.prune.random_sets import draw_matched_sets, draw_sets
from gpt2.prune.remove import claimed_count, remove_heads
from gpt2.prune.study import loss_without_attention
from gpt2.train.loop import Evaluation, TrainConfig, fit

RESULTS = Path("bench/results/recipes.csv")
SEEDS = (1337, 1, 2, 3)
LOCAL = Dist(0, 0, 1, torch.device("cpu"))
SHAPE = {"n_layer": 4, "n_head": 8, "n_embd": 128, "block_size": 128}
FIXED: dict[str, Any] = {
    "init_from": None, "epochs": None, "precision": "float32", "compile": False, "deterministic": False,
    "muon_momentum": 0.95, "warmup_steps": 20, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1, "grad_clip": 1.0,
    "eval_interval": 10**6, "checkpoint_interval": 10**6, "log_interval": 100, "eval_tokens": 16384,
    "eval_items": 503,
}  # fmt: skip
HEADS = HeadsConfig(n_tokens=16384, batch_size=16, threshold=0.85, null_percentile=95, seed=1337)
# Column of the table for each figure of the heads.
HEAD_FIGURES = {
    **{key: key for key in ("redundant_pairs", "shuffled_redundant_pairs", "mean_similarity")},
    "centred_mean": "mean_centred_similarity",
    "untrained_centred_mean": "untrained_mean_centred_similarity",
    "centred_pairs_above_untrained_95": "pairs_above_untrained_centred_threshold",
}
EVAL_TOKENS, SCORING_TOKENS, BATCH = 8192, 8192, 16
RANDOM_SETS, MATCHED_SETS = 19, 15


class Recipe(NamedTuple):
    """What differs between the models."""

    name: str
    encoding: str
    optimizer: Literal["adamw", "muon"]
    max_lr: float
    max_steps: int
    tokens_per_step: int = 2048
    shape: dict[str, int] = SHAPE


RECIPES = (
    Recipe("adamw_8192", "bpe_8192", "adamw", 3e-3, 800),
    Recipe("adamw_4096", "bpe_4096", "adamw", 3e-3, 1000),
    Recipe("adamw_4096_fast", "bpe_4096", "adamw", 8e-3, 1000),
    Recipe("muon_4096", "bpe_4096", "muon", 1.6e-2, 300),
    Recipe("muon_4096_200", "bpe_4096", "muon", 1.6e-2, 200),
    Recipe("muon_4096_600", "bpe_4096", "muon", 1.6e-2, 600),
    Recipe("muon_4096_slow", "bpe_4096", "muon", 6e-3, 600),
    Recipe("muon_4096_fast", "bpe_4096", "muon", 3e-2, 300),
    Recipe("muon_2048", "bpe_2048", "muon", 1.6e-2, 300),
    Recipe("muon_half_batch", "bpe_4096", "muon", 1.6e-2, 600, 1024),
    Recipe("muon_half_context", "bpe_4096", "muon", 1.6e-2, 600, 1024, {**SHAPE, "block_size": 64}),
    Recipe("muon_half_width", "bpe_4096", "muon", 2e-2, 400, shape={**SHAPE, "n_embd": 64}),
    Recipe("muon_4_heads", "bpe_4096", "muon", 1.6e-2, 300, shape={**SHAPE, "n_head": 4}),
    Recipe("muon_6_layers", "bpe_4096", "muon", 1.6e-2, 300, shape={**SHAPE, "n_layer": 6, "n_head": 6, "n_embd": 96}),
)


def measure(folder: Path, task: tuple[Recipe, int]) -> dict[str, Any]:
    """Train one model and take the figures that the claims on heads and pruning rest on."""
    torch.set_num_threads(1)
    recipe, seed = task
    train, val, test = (TokenSet(folder / recipe.encoding, split) for split in ("train", "val", "test"))
    shape = GPTConfig(**recipe.shape, vocab_size=train.vocabulary.vocab_size, norm="preln")  # type: ignore[arg-type]
    model, started = GPT(shape, seed), time.perf_counter()
    figures = learn(model, recipe, seed, train, val, folder)
    figures["train_seconds"] = time.perf_counter() - started
    heads = study_heads(model, val, HEADS)
    figures |= {key: heads.figures[name] for key, name in HEAD_FIGURES.items()}
    scoring = spread_windows(val, shape.block_size, SCORING_TOKENS)
    taylor = score_taylor(model, scoring, BATCH)
    orders = {name: ranked[0] for name, ranked in rank_heads(model, heads.matrices["pattern"], taylor, [1]).items()}
    figures |= pruning_figures(model, orders, spread_windows(test, shape.block_size, EVAL_TOKENS))
    return {"recipe": recipe.name, "seed": seed, **{key: round(float(value), 4) for key, value in figures.items()}}


def learn(model: GPT, recipe: Recipe, seed: int, train: TokenSet, val: TokenSet, folder: Path) -> dict[str, float]:
    """Train the model in place; its loss and accuracy at the end."""
    block_size, windows = model.config.block_size, recipe.tokens_per_step // model.config.block_size
    config = TrainConfig(
        **FIXED, optimizer=recipe.optimizer, max_lr=recipe.max_lr, min_lr=recipe.max_lr / 10, micro_batch=windows,
        max_steps=recipe.max_steps, tokens_per_step=recipe.tokens_per_step, seed=seed,
    )  # fmt: skip
    benchmark = load_benchmark(folder / recipe.encoding / "hellaswag.npz")
    evaluation = Evaluation(eval_windows(val, block_size, config.eval_tokens), benchmark, BATCH, 8192, "float32")
    with tempfile.TemporaryDirectory() as scratch:
        order = TrainOrder(train, block_size, windows, seed)
        rows = fit(model, config, order, evaluation, LOCAL, Path(scratch)).rows
    _, _, loss, _, acc_norm = rows["eval"][-1]
    return {"bits_per_byte": loss / np.log(2) * val.n_tokens / val.n_bytes, "acc_norm": acc_norm}


def pruning_figures(model: GPT, orders: dict[str, list[Head]], windows: Tensor) -> dict[str, float]:
    """Rise of perplexity in percent without 15 % of the heads, chosen in several ways, and what attention is worth."""
    heads = list_heads(model.config)
    count = claimed_count(len(heads))

    def loss(removed: Sequence[Head]) -> float:
        return window_losses(remove_heads(model, removed), windows, BATCH).double().mean().item()

    whole = loss([])

    def rise(removed: Sequence[Head]) -> float:
        return 100 * np.expm1(loss(removed) - whole)

    redundant = orders["redundancy"][:count]
    random_sets = [rise(some) for some in draw_sets(heads, count, RANDOM_SETS)]
    matched_sets = [rise(some) for some in draw_matched_sets(heads, redundant, MATCHED_SETS)]
    return {
        **{f"rise_{name}": rise(orders[name][:count]) for name in ("redundancy", "taylor", "magnitude")},
        "rise_random": float(np.mean(random_sets)),
        "rise_random_same_layers": float(np.mean(matched_sets)),
        "cheaper_random": sum(value < rise(redundant) for value in random_sets),
        "cheaper_random_same_layers": sum(value < rise(redundant) for value in matched_sets),
        "attention_nats": loss_without_attention(model, windows, BATCH) - whole,
    }


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m bench.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds a folder of tokens for each vocabulary")
    parser.add_argument("--workers", type=int, default=2, help="models trained at a time (default: %(default)s)")
    parser.add_argument("--recipes", nargs="+", default=[recipe.name for recipe in RECIPES], metavar="NAME")
    options = parser.parse_args(argv)
    tasks = [(recipe, seed) for recipe in RECIPES if recipe.name in options.recipes for seed in SEEDS]
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = None
        with closing(in_order(partial(measure, options.folder), tasks, options.workers)) as rows:
            for row in rows:
                writer = writer or csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                print(row["recipe"], row["seed"], row["bits_per_byte"], flush=True)


if __name__ == "__main__":
    with reporting("bench.recipes"):
        main(sys.argv[1:])
