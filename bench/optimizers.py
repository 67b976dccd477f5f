"""AdamW and Muon on the tiny model: validation loss against tokens, each at several learning rates, the same budget.

    python -m bench.optimizers run OUT.json [--seeds 1 2 3]     # after make repro; minutes on a GPU
    python -m bench.optimizers table OUT.json ...               # bench/results/optimizers.md and its picture

Everything but `optimizer` and the learning rate is the block `tiny` of params.yaml; min_lr stays a tenth of max_lr.
A seed decides the initial weights and the order of the data.
"""

import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import eval_windows
from gpt2.hellaswag.items import load_benchmark
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import atomic_path, read_json, write_json, write_text
from gpt2.pipeline.params import load, read
from gpt2.train.loop import Evaluation, TrainConfig, fit

TOKENS = Path("data/tokens")
RESULT, PICTURE = Path("bench/results/optimizers.md"), Path("bench/results/optimizers.png")
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the blocks' matrices, AdamW for the rest"}
COLOURS = {"adamw": "#0072b2", "muon": "#d55e00"}


def train(optimizer: str, max_lr: float, seed: int, dist: Dist) -> list[list]:
    """Rows of step, tokens and validation loss."""
    values = {**read(), "scale": "tiny"}
    values["tiny"]["train"] |= {"optimizer": optimizer, "max_lr": max_lr, "min_lr": max_lr / 10, "seed": seed}
    values["tiny"]["train"] |= {"eval_interval": 40, "eval_items": 1, "checkpoint_interval": 10**9}
    config = load("train", TrainConfig, values)
    tokens, val = TokenSet(TOKENS, "train"), TokenSet(TOKENS, "val")
    shape = load("model", GPTConfig, values, norm="preln", vocab_size=tokens.vocabulary.vocab_size)
    order = TrainOrder(tokens, shape.block_size, config.batch_windows(shape.block_size), seed)
    evaluation = Evaluation(
        eval_windows(val, shape.block_size, config.eval_tokens),
        load_benchmark(TOKENS / "hellaswag.npz").first(config.eval_items),
        config.micro_batch,
        values["tiny"]["hellaswag"]["batch_tokens"],
        config.precision,
    )
    model = GPT(shape, seed).to(dist.device)
    with tempfile.TemporaryDirectory() as scratch:
        result = fit(model, config, order, evaluation, dist, Path(scratch))
    return [row[:3] for row in result.rows["eval"]]


def run(out: Path, seeds: list[int]) -> None:
    """Train every setting and write all curves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    dist = Dist(0, 0, 1, device)
    runs = []
    for optimizer in OPTIMIZERS:
        for max_lr in LEARNING_RATES:
            for seed in seeds:
                rows = train(optimizer, max_lr, seed, dist)
                runs.append({"optimizer": optimizer, "max_lr": max_lr, "seed": seed, "rows": rows})
                print(optimizer, max_lr, seed, rows[-1], flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    write_json(out, {"device": name, "torch": torch.__version__, "date": date.today().isoformat(), "runs": runs})


def final_losses(runs: list[dict], optimizer: str, max_lr: float) -> list[float]:
    """Validation losses at the end, by seed."""
    return [r["rows"][-1][2] for r in runs if (r["optimizer"], r["max_lr"]) == (optimizer, max_lr)]


def mean_curve(runs: list[dict], optimizer: str, max_lr: float) -> np.ndarray:
    """Tokens and mean validation loss of a setting, (evaluations, 2)."""
    curves = [r["rows"] for r in runs if (r["optimizer"], r["max_lr"]) == (optimizer, max_lr)]
    return np.array([[rows[0][1], np.mean([row[2] for row in rows])] for rows in zip(*curves, strict=False)])


def tabulate(outs: list[Path]) -> None:
    """Write the page and its picture."""
    measured = [read_json(out) for out in outs]
    runs = [r for part in measured for r in part["runs"]]
    best = {name: min(LEARNING_RATES, key=lambda lr: np.mean(final_losses(runs, name, lr))) for name in OPTIMIZERS}
    lines = ["| Learning rate | AdamW | Muon |", "|--:|--:|--:|"]
    for max_lr in LEARNING_RATES:
        cells = []
        for name in OPTIMIZERS:
            losses = final_losses(runs, name, max_lr)
            mark = "**" if best[name] == max_lr else ""
            cells.append(f"{mark}{np.mean(losses):.3f}{mark} ± {np.std(losses, ddof=1):.3f}")
        lines.append(f"| {max_lr:g} | {' | '.join(cells)} |")
    adamw, muon = (mean_curve(runs, name, best[name]) for name in OPTIMIZERS)
    reached = muon[muon[:, 1] <= adamw[-1, 1]]
    edges = [OPTIMIZERS[name] for name in OPTIMIZERS if best[name] in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    edge = f" The best rate of {' and '.join(edges)} is the last one tried." if edges else ""
    share = f"{reached[0, 0] / adamw[-1, 0]:.0%} of the tokens" if len(reached) else "not within the budget"
    seeds = f"mean and standard deviation over {len({r['seed'] for r in runs})} seeds"
    write_text(
        RESULT,
        f"# AdamW and Muon, tiny model\n\nValidation loss in nats per token after {adamw[-1, 0]:,.0f} tokens, {seeds}; "
        f"the best rate of each in bold.\n\n{chr(10).join(lines)}\n\n"
        f"![Validation loss against tokens]({PICTURE.name})\n\n"
        f"At its best rate Muon reaches AdamW's best final loss after: {share} (evaluated every 40 steps).{edge}\n\n"
        f"`python -m bench.optimizers run`, {measured[0]['device']}, torch {measured[0]['torch']}, "
        f"{measured[0]['date']}.\n",
    )
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in OPTIMIZERS:
        for max_lr in LEARNING_RATES:
            curve = mean_curve(runs, name, max_lr)
            top = max_lr == best[name]
            axes.plot(
                curve[:, 0] / 1e3, curve[:, 1],
                color=COLOURS[name], linewidth=2 if top else 0.8, alpha=1 if top else 0.4,
                label=f"{OPTIMIZERS[name]}, {max_lr:g}" if top else None,
            )  # fmt: skip
    low = min(mean_curve(runs, name, best[name])[-1, 1] for name in OPTIMIZERS)
    axes.set(xlabel="Tokens (thousands)", ylabel="Validation loss (nats per token)", ylim=(low - 0.1, low + 3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(PICTURE) as temporary:
        figure.savefig(temporary, format="png")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.optimizers", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("out", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args(argv)
    if arguments.action == "run":
        run(arguments.out[0], arguments.seeds)
    else:
        tabulate(arguments.out)


if __name__ == "__main__":
    with reporting("bench.optimizers"):
        main(sys.argv[1:])
