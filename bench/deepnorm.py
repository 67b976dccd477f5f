"""Why DeepNorm stalls at GPT-2's own size under AdamW: one run a setting, with the signs of rank collapse on the way.

    python -m bench.deepnorm run TOKENS.npy OUT.csv      # minutes on a GPU; a row is added when a run ends
    python -m bench.deepnorm table OUT.csv ...           # bench/results/deepnorm.csv, .png and the table on stdout

TOKENS.npy holds GPT-2 ids in one array; its last 131,072 are the validation text. The base setting is the norm study of
the scale `short`: 12 blocks of 768 channels, context 256, 200 steps of 64 windows, 6e-4 after a warm-up of 100 steps.
"""

import csv
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gpt2.model.config import GPTConfig, Norm
from gpt2.model.dist import autocast
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.norm_study.study import unigram_losses
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import atomic_path
from gpt2.train.optim import OptimConfig, Optimizer, Together, build_optimizer, lr_at
from gpt2.train.short_runs import order_windows

RESULTS = Path("bench/results")
CONTEXT, VAL_WINDOWS, BATCH, MICRO_BATCH, VOCAB = 256, 512, 64, 32, 50257
STEPS_MEASURED = (10, 20, 50, 100)
# A run that ends less than this below the unigram loss, in nats, has stalled.
LEARNED = 0.1
GROUPS = {"embeddings": ("wte", "wpe"), "attention": ("attn.c_",), "MLP": ("mlp.c_",), "blocks": ("attn.c_", "mlp.c_")}


@dataclass(frozen=True)
class Arm:
    """One run. `slow` and `muon` name a group of matrices: a tenth of the rate, or Muon in place of AdamW."""

    name: str = "base"
    seed: int = 1
    norm: Norm = "deepnorm"
    optimizer: str = "adamw"
    max_lr: float = 6e-4
    warmup_steps: int = 100
    steps: int = 200
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    n_layer: int = 12
    n_embd: int = 768
    slow: str = ""
    slow_factor: float = 0.1
    muon: str = ""
    # 0 leaves what the norm prescribes.
    alpha: float = 0.0
    block_std: float = 0.0
    embedding_std: float = 0.0


BASE = Arm()
ARMS = (
    replace(BASE, name="warm-up 800 of 900 steps", warmup_steps=800, steps=900),
    BASE,
    replace(BASE, seed=2),
    *(replace(BASE, name=f"rate {lr:g}", max_lr=lr) for lr in (2e-4, 1e-4, 5e-5)),
    replace(BASE, name="Muon 2e-3", optimizer="muon", max_lr=2e-3),
    replace(BASE, name="slow blocks", slow="blocks"),
    replace(BASE, name="slow embeddings", slow="embeddings"),
    replace(BASE, name="slow attention", slow="attention"),
    replace(BASE, name="slow MLP", slow="MLP"),
    replace(BASE, name="Muon for attention", muon="attention"),
    replace(BASE, name="Muon for MLP", muon="MLP"),
    replace(BASE, name="Post-LN", norm="postln"),
    replace(BASE, name="alpha 1", alpha=1.0),
    replace(BASE, name="blocks at 0.02", block_std=0.02),
    replace(BASE, name="slow blocks", slow="blocks", seed=2),
    replace(BASE, name="rate 0.0001", max_lr=1e-4, seed=2),
    replace(BASE, name="6 blocks", n_layer=6),
    replace(BASE, name="width 384", n_embd=384),
    replace(BASE, name="beta2 0.999", beta2=0.999),
    replace(BASE, name="no weight decay", weight_decay=0.0),
    replace(BASE, name="embeddings at 0.2", embedding_std=0.2),
    replace(BASE, name="clip 0.1", grad_clip=0.1),
    replace(BASE, name="Muon 6e-4", optimizer="muon"),
    replace(BASE, name="Muon for attention", muon="attention", seed=2),
    replace(BASE, name="Muon for MLP", muon="MLP", seed=2),
    replace(BASE, name="beta2 0.98", beta2=0.98),
)


def read_windows(path: Path) -> tuple[Tensor, Tensor]:
    """Training and validation windows, each (N, context + 1), of one array of ids."""
    ids = np.load(path).astype(np.int64)
    windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return torch.from_numpy(windows[:-VAL_WINDOWS]), torch.from_numpy(windows[-VAL_WINDOWS:])


def build_model(arm: Arm) -> GPT:
    """The model at its start."""
    shape = GPTConfig(
        n_layer=arm.n_layer, n_head=12, n_embd=arm.n_embd, block_size=CONTEXT, vocab_size=VOCAB, norm=arm.norm
    )
    model = GPT(shape, arm.seed)
    generator = torch.Generator().manual_seed(arm.seed + 1000)
    for block in model.h:
        block.alpha = arm.alpha or block.alpha
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if arm.block_std and name.endswith("weight") and ".c_" in name:
                parameter.normal_(std=arm.block_std, generator=generator)
            elif arm.embedding_std and name.startswith("w"):
                parameter.mul_(arm.embedding_std / 0.02)
    return model


def members(model: GPT, group: str) -> list[nn.Parameter]:
    """The matrices of a group."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and any(key in name for key in GROUPS[group])]


def make_optimizer(model: GPT, arm: Arm, config: OptimConfig) -> Optimizer:
    """The project's optimizer; the arm's group gets a parameter group with `factor`, or Muon."""
    optimizer = build_optimizer(model, config)
    chosen = members(model, arm.slow or arm.muon) if arm.slow or arm.muon else []
    if not chosen:
        return optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    ids = {id(p) for p in chosen}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    if arm.slow:
        optimizer.add_param_group({"params": chosen, "weight_decay": arm.weight_decay, "factor": arm.slow_factor})
        return optimizer
    muon = torch.optim.Muon(
        chosen, lr=config.max_lr, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, optimizer)


@torch.no_grad()
def token_cosine(model: GPT, windows: Tensor) -> float:
    """Mean cosine between the final hidden states of different positions of a window."""
    with autocast(windows.device, "bfloat16"):
        hidden = model.hidden(windows[:, :-1])
    unit = nn.functional.normalize(hidden.float(), dim=-1)
    n = unit.shape[1]
    return float(((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).mean())


def gradient_ratio(model: GPT) -> float:
    """Gradient norm of the first block over that of the last."""
    first, last = (
        torch.stack([p.grad.norm() for p in block.parameters() if p.grad is not None]).norm()
        for block in (model.h[0], model.h[-1])
    )
    return float(first / last)


@torch.no_grad()
def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value, by power iteration."""
    vector = torch.ones(matrix.shape[1], device=matrix.device)
    for _ in range(30):
        vector = nn.functional.normalize(matrix.t() @ (matrix @ vector), dim=0)
    return float((matrix @ vector).norm())


@torch.no_grad()
def movement(model: GPT, start: list[Tensor]) -> float:
    """Spectral norm of the change of a block's matrix over that of its start, mean over matrices."""
    pairs = zip(members(model, "blocks"), start, strict=True)
    return float(np.mean([spectral_norm(p - s) / spectral_norm(s) for p, s in pairs]))


def train(arm: Arm, path: Path) -> dict[str, Any]:
    """Train one arm; its row of the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    windows, val = read_windows(path)
    values = asdict(arm) | {"max_steps": arm.steps, "min_lr": arm.max_lr / 10, "beta1": 0.9}
    config = OptimConfig(**{key: values[key] for key in OptimConfig.model_fields if key in values})
    model = build_model(arm).to(device)
    start = [p.detach().clone() for p in members(model, "blocks")]
    optimizer = make_optimizer(model, arm, config)
    row: dict[str, Any] = asdict(arm) | {"cos_0": token_cosine(model, val[:8].to(device))}
    for step, chosen in enumerate(order_windows(len(windows), arm.steps, BATCH, arm.seed), 1):
        for part in windows[chosen].to(device).split(MICRO_BATCH):
            with autocast(device, "bfloat16"):
                loss = model(part[:, :-1], part[:, 1:]) * (len(part) / BATCH)
            loss.backward()
        name = "end" if step == arm.steps else str(step)
        if step in STEPS_MEASURED or name == "end":
            row |= {f"grad_{name}": gradient_ratio(model)}
        nn.utils.clip_grad_norm_(model.parameters(), arm.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step - 1, config) * group.get("factor", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS_MEASURED or name == "end":
            row |= {f"cos_{name}": token_cosine(model, val[:8].to(device)), f"moved_{name}": movement(model, start)}
    unigram = unigram_losses(windows, val)[1]
    val_loss = mean_loss(model, val, MICRO_BATCH, "bfloat16")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    made = {"device": name, "torch": torch.__version__, "date": date.today().isoformat()}
    return row | {"val_loss": val_loss, "unigram": unigram, "learned": unigram - val_loss} | made


def columns() -> list[str]:
    """Of the table: the arm, what was measured on the way, the end."""
    steps = (*map(str, STEPS_MEASURED), "end")
    measured = [f"{kind}_{step}" for kind in ("cos", "grad", "moved") for step in steps]
    made = ["val_loss", "unigram", "learned", "device", "torch", "date"]
    return [*(f.name for f in fields(Arm)), "cos_0", *measured, *made]


def run(tokens: Path, out: Path, processes: int) -> None:
    """Train every arm, several at a time on one GPU; a row is written as soon as its run ends."""
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns())
        writer.writeheader()
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(train, arm, tokens) for arm in ARMS]):
                row = future.result()
                writer.writerow(row)
                file.flush()
                print(row["name"], row["seed"], f"{row['learned']:.3f}", flush=True)


def draw(rows: list[dict[str, str]]) -> Figure:
    """Nats learned beyond the unigram loss, and cosine between tokens on the way, by setting."""
    rows = sorted(rows, key=lambda row: float(row["learned"]))
    figure = Figure(figsize=(10, 6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["name"] for row in rows))
    steps = (0, *STEPS_MEASURED)
    for row in rows:
        colour = "#0072b2" if float(row["learned"]) > LEARNED else "#d55e00"
        left.plot(float(row["learned"]), names.index(row["name"]), "o", color=colour)
        cosines = [float(row[f"cos_{step}"]) for step in steps]
        right.plot([*steps, 120], [*cosines, float(row["cos_end"])], color=colour, linewidth=1, alpha=0.7)
    left.set_yticks(range(len(names)), names)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="Unigram loss minus validation loss (nats); near 0: stalled")
    right.set(xlabel="Step", ylabel="Cosine between tokens, last block (blue: trains, orange: stalls)")
    right.set_xticks([*steps, 120], [*map(str, steps), "end"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def tabulate(outs: list[Path]) -> None:
    """Write the CSV of all runs and the picture; print the table."""
    rows = []
    for out in outs:
        with out.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    with (RESULTS / "deepnorm.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic_path(RESULTS / "deepnorm.png") as temporary:
        draw(rows).savefig(temporary, format="png")
    steps = (*map(str, STEPS_MEASURED), "end")
    heads = [f"{kind} {step}" for kind in ("cos", "grad") for step in steps]
    print(f"| setting | seed | val loss | against unigram | moved 20 | {' | '.join(heads)} |")
    print(f"|---|{'--:|' * (4 + len(heads))}")
    for row in sorted(rows, key=lambda row: float(row["learned"])):
        cells = [f"{float(row[f'{kind}_{step}']):.3f}" for kind in ("cos", "grad") for step in steps]
        loss, against, moved = float(row["val_loss"]), -float(row["learned"]), float(row["moved_20"])
        print(f"| {row['name']} | {row['seed']} | {loss:.3f} | {against:+.3f} | {moved:.2f} | {' | '.join(cells)} |")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.deepnorm", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args(argv)
    if arguments.action == "run":
        tokens, out = arguments.files
        run(tokens, out, arguments.processes)
    else:
        tabulate(arguments.files)


if __name__ == "__main__":
    with reporting("bench.deepnorm"):
        main(sys.argv[1:])
