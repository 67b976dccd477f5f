"""Does a precision of training change what is learned? GPT-2 (124M), the same data at each precision, several seeds.

python -m bench.learning train TOKENS [--settings bfloat16_mixed bfloat16 fp8_head] [--seeds 1 2] [--steps 600]
python -m bench.learning table

TOKENS is a folder as the stage `tokenize` writes it. Validation losses are appended to bench/results/learning.csv,
from which the table makes bench/results/learning.md.
"""

import sys
import time
from pathlib import Path

import pandas as pd
import torch

from bench.speed import SETTINGS
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.evaluate import mean_loss
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_text
from gpt2.pipeline.params import load, read
from gpt2.train.loop import Stepper, TrainConfig
from gpt2.train.optim import build_optimizer
from gpt2.train.setup import build_run

RESULT = Path("bench/results/learning.csv")
EVERY = 100
RECIPE = {"optimizer": "muon", "max_lr": 4e-3, "min_lr": 4e-4, "warmup_steps": 30, "eval_tokens": 524288}


def train(setting: str, seed: int, steps: int, folder: Path) -> None:
    """Train one model and append a row for every evaluation."""
    values = {**read(), "scale": "short"}
    values["short"]["train"] |= RECIPE | SETTINGS[setting] | {"seed": seed, "max_steps": steps, "eval_items": 10}
    config = load("train", TrainConfig, values)
    shape = load("model", GPTConfig, values, norm="preln", vocab_size=50257)
    dist = Dist(0, 0, 1, torch.device("cuda", 0))
    run = build_run(config, shape, values["short"]["hellaswag"]["batch_tokens"], folder, dist)
    stepper = Stepper(run.model, build_optimizer(run.model, config), config, run.order, dist)
    started, last = time.perf_counter(), 0
    for step in range(steps + 1):
        if step and (step % EVERY == 0 or step == steps):
            torch.cuda.synchronize()
            rate = (step - last) * config.tokens_per_step / (time.perf_counter() - started)
            val_loss = mean_loss(run.model, run.evaluation.windows, 32, "bfloat16")
            row = pd.DataFrame([{"setting": setting, "seed": seed, "step": step, "val_loss": val_loss, "rate": rate}])
            row.to_csv(RESULT, mode="a", header=not RESULT.exists(), index=False)
            print(setting, seed, step, round(val_loss, 4), f"{rate:,.0f} tokens/s", flush=True)
            started, last = time.perf_counter(), step
        if step < steps:
            stepper.backward(step)
            stepper.clip()
            stepper.update(step)


def tabulate() -> None:
    """Write the page."""
    rows = pd.read_csv(RESULT)
    recipe = ", ".join(f"{key} {value}" for key, value in RECIPE.items() if key != "eval_tokens")
    table = rows.pivot_table(index="step", columns=["setting", "seed"], values="val_loss")
    table.columns = pd.Index([f"`{column[0]}`, seed {column[1]}" for column in table.columns])
    page = [
        "# GPT-2 (124M) at several precisions",
        f"Validation loss in nats over {RECIPE['eval_tokens']:,} tokens after steps of 524,288 tokens, section `short` "
        f"with {recipe}. The settings are those of [speed.md](speed.md). A run that was cut short has no further rows.",
        table.to_markdown(floatfmt=".4f", missingval=""),
    ]
    write_text(RESULT.with_suffix(".md"), "\n\n".join(page) + "\n")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.learning", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    training = actions.add_parser("train")
    training.add_argument("tokens", type=Path)
    training.add_argument(
        "--settings", nargs="+", choices=[*SETTINGS][1:], default=["bfloat16_mixed", "bfloat16", "fp8_head"]
    )
    training.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    training.add_argument("--steps", type=int, default=600)
    actions.add_parser("table")
    arguments = parser.parse_args(argv)
    if arguments.action == "table":
        tabulate()
        return
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(0)
    for seed in arguments.seeds:
        for setting in arguments.settings:
            train(setting, seed, arguments.steps, arguments.tokens)


if __name__ == "__main__":
    with reporting("bench.learning"):
        main(sys.argv[1:])
