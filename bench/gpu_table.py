"""bench/results/gpu.md and its picture, from the files that `python -m bench.gpu` left in bench/results/gpu/."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.gpu import EXPERIMENTS, LENGTH, SHORT
from gpt2.pipeline.command import reporting
from gpt2.pipeline.files import atomic_path, read_json, write_text
from gpt2.pipeline.params import read

FOLDER = Path("bench/results/gpu")
RESULT, PICTURE = FOLDER.with_suffix(".md"), FOLDER.with_suffix(".png")
COLUMNS = (
    *("Run", "Device", "Killed at step", "Resumed after", "Validation loss", "Tokens/s", "GPU memory (GiB)"),
    "SHA-256 of the weights",
)
# Runs of code that reads each micro-batch while the GPU works, into pages that cannot move.
READ_AHEAD = ("evaluating", "free-again", "fused")
CURVES = {"whole": "#0072b2", "fused": "#cc79a7", "killed": "#56b4e9", "pair-killed": "#009e73", "postln": "#d55e00"}


def read_losses(result: Mapping) -> pd.DataFrame:
    """Step, tokens, loss, learning rate and gradient norm of every step."""
    return pd.read_csv(StringIO(result["train"]))


def row_of(result: Mapping) -> str:
    """One line of the table."""
    speed, metrics = result["speed"], result["metrics"]
    device = f"{speed['processes']} × {result['device']}"
    killed = "" if result["killed_at_step"] is None else str(result["killed_at_step"])
    measured = (f"{metrics['val_loss']:.4f}", f"{speed['tokens_per_s']:,.0f}", f"{speed['peak_gpu_memory_gib']:.1f}")
    cells = (result["says"], device, killed, ", ".join(result["resumed"]), *measured, f"`{result['sha256'][:16]}`")
    return f"| {' | '.join(cells)} |"


def compare(results: Mapping[str, Mapping], first: str, second: str) -> str:
    """How two runs differ, in words."""
    one, other = results[first], results[second]
    names = f"“{one['says']}” and “{other['says']}”"
    if one["sha256"] == other["sha256"] and one["train"] == other["train"]:
        return f"- {names}: the same bits, weights and all rows."
    apart = (read_losses(one)["loss"] - read_losses(other)["loss"]).abs().max()
    return f"- {names}: training losses at most {apart:.4f} nats apart."


def describe_costs(result: Mapping) -> str:
    """What checkpoints and evaluations of an undisturbed run took, and the shares that they are of a run at `full`."""
    speed, length, full = result["speed"], EXPERIMENTS["evaluating"].train, read()["full"]["train"]
    stepping = (length["max_steps"] - 1) * full["tokens_per_step"] / speed["tokens_per_s"]
    total = stepping / (1 - (speed["checkpoint_percent"] + speed["evaluation_percent"]) / 100)
    saves, evaluations = (length["max_steps"] // length[f"{kind}_interval"] for kind in ("checkpoint", "eval"))
    save = total * speed["checkpoint_percent"] / 100 / saves
    evaluation = total * speed["evaluation_percent"] / 100 / (evaluations + 1)
    step = full["tokens_per_step"] / speed["tokens_per_s"]
    return (
        f"A checkpoint takes {save:.1f} s, an evaluation of {length['eval_items']:,} HellaSwag items and "
        f"{length['eval_tokens']:,} tokens {evaluation:.1f} s (“{result['says']}”; its validation tokens are training "
        f"text, since only the time was asked for). At the intervals of `full`, {full['checkpoint_interval']:,} and "
        f"{full['eval_interval']:,} steps, these are {save / (full['checkpoint_interval'] * step):.2%} and "
        f"{evaluation / (full['eval_interval'] * step):.2%} of the time on one such GPU."
    )


def describe(results: Mapping[str, Mapping]) -> str:
    """The page."""
    whole, postln = results["whole"], results["postln"]
    entropy = whole["metrics"]["unigram_entropy"]
    rows = [row_of(results[name]) for name in EXPERIMENTS if name in results]
    pairs = (
        *(("exact", "exact-killed"), ("exact-pair", "exact-pair-killed"), ("exact", "exact-pair")),
        *(("exact", "free"), ("whole", "killed"), ("whole", "pair-killed")),
    )
    exact, free = (results[name]["speed"]["tokens_per_s"] for name in ("exact", "free"))
    waits = [result["speed"]["data_wait_percent"] for name, result in results.items() if name not in READ_AHEAD]
    dates = sorted({result["date"] for result in results.values()})
    return "\n".join(
        [
            "# The training engine on GPUs: GPT-2 (124M), bfloat16, torch.compile, 1,024 tokens of context",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *rows,
            "",
            "What the kills left:",
            "",
            *(compare(results, *pair) for pair in pairs),
            "",
            f"Post-LN ends at {postln['metrics']['val_loss']:.4f} nats, where it guesses by token frequency alone "
            f"(unigram entropy {entropy:.4f}): `stalled` is {postln['metrics']['stalled']}, with "
            f"{postln['metrics']['loss_spikes']} spikes and `diverged` {postln['metrics']['diverged']}. Pre-LN ends at "
            f"{whole['metrics']['val_loss']:.4f}.",
            "",
            f"![Training loss of the runs of {LENGTH['max_steps']} steps]({PICTURE.name})",
            "",
            f"`train.deterministic` costs {1 - exact / free:.1%} of the rate on {results['free']['device']}.",
            "",
            describe_costs(results["evaluating"]),
            "",
            "The runs waited for data for "
            + ", ".join(
                f"{results[name]['speed']['data_wait_percent']:.2f} % (“{results[name]['says']}”)"
                for name in READ_AHEAD
            )
            + f" of the time of their steps. The others, for which it was {min(waits):.1f} to {max(waits):.1f} %, ran "
            "before each micro-batch was read while the GPU works, or was copied from pages that cannot move.",
            "",
            "The speed of training has [a page of its own](speed.md); these runs are older. In all of them but “"
            f"{results['fused']['says']}” the loss took several passes over logits in fp32; now one kernel computes "
            "losses and gradients in place, from logits in bfloat16.",
            "",
            f"Long runs: {LENGTH['max_steps']} steps of 524,288 tokens; short ones: {SHORT['max_steps']} steps of "
            f"{SHORT['tokens_per_step']:,}. 19,200,142 tokens of open textbooks and public-domain books. Rates leave "
            f"out validation and checkpoints; those of “{whole['says']}” and “{results['killed']['says']}” hold the "
            "time of compiling, all others leave out the first step.",
            "",
            f"`python -m bench.gpu TOKENS OUT {' '.join(results)}`, torch {whole['torch']}, {', '.join(dates)}.",
            "",
        ]
    )


def draw(results: Mapping[str, Mapping]) -> Figure:
    """Loss against step of the long runs; kills are marked."""
    figure = Figure(figsize=(7.5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, colour in CURVES.items():
        result = results[name]
        losses = read_losses(result)
        label = f"{result['says']} ({result['speed']['processes']} × {result['device'].split()[1]})"
        axes.plot(losses["step"], losses["loss"], color=colour, linewidth=1.5, label=label)
        if result["killed_at_step"] is not None:
            step = result["killed_at_step"]
            axes.plot(step, losses["loss"][step - 1], "x", color=colour, markersize=9, markeredgewidth=2)
    entropy = results["whole"]["metrics"]["unigram_entropy"]
    axes.axhline(entropy, color="#555555", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="Step", ylabel="Training loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    results = {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}
    write_text(RESULT, describe(results))
    with atomic_path(PICTURE) as temporary:
        draw(results).savefig(temporary, format="png")


if __name__ == "__main__":
    with reporting("bench.gpu_table"):
        main()
