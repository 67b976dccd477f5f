"""The figures of the report, drawn from metrics and curves alone; equal files give equal bytes."""

import itertools
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from gpt2.pipeline.files import atomic_path
from gpt2.report import names
from gpt2.report.claims import HELLASWAG_CHANCE, MAX_RISE_PERCENT
from gpt2.report.names import CRITERIA, REPAIRED, REPAIRS, SIMILARITIES, split_pruning
from gpt2.report.panels import (
    GREEN,
    GREY,
    INK,
    RED,
    STYLE,
    add_legend,
    colour_ramp,
    draw_level,
    make_panels,
    scale_log,
    scale_vocabulary,
)
from gpt2.report.results import Results
from gpt2.report.tables import load_models, load_vocabularies, load_vocabulary_runs
from gpt2.report.verdicts import mean_interval

Drawings = dict[str, Callable[[Results], Figure]]
NORM_COLOURS = {"preln": "#0072b2", "postln": "#d55e00", "deepnorm": GREEN}
NULL_COLOURS = {"shuffled": ("shuffled tokens", RED), "untrained": ("untrained model", GREY)}
GROUP_COLOURS = dict(zip(names.WORD_GROUPS, ("#332288", "#44aa99", "#aa4499"), strict=True))
CRITERION_COLOURS = dict(zip(CRITERIA, (RED, "#e69f00", "#d55e00", "#56b4e9", GREY, GREEN), strict=True))
SIMILARITY_COLOURS = ("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee", "#882255")
MARKERS = "os^Dv*"
LINES: tuple[Any, ...] = ("-", "-", "-.", ":", "--", (0, (1, 3)))
REPAIR_LINES = dict(zip(("none", *REPAIRS.values()), LINES, strict=True))
RUN = ["arm", "norm", "max_lr", "warmup_steps", "seed"]  # identifies a run of the norm study
MAX_STEPS = 6  # lines per panel that can be distinguished
RISES = (-50, -20, -10, 0, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000, 100_000)


def write_figures(results: Results, folder: Path, drawings: Drawings) -> dict[str, Path]:
    """Draw FIGURES or TIMED_FIGURES into `folder`; returns their paths by name.

    Raises UserError if a file, key or column is missing.
    """
    paths = {name: folder / f"{name}.png" for name in drawings}
    for name, path in paths.items():
        with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
            # Without the software's name, the bytes do not depend on its version.
            drawings[name](results).savefig(temporary, format="png", metadata={"Software": None})
    return paths


def plot_loss(results: Results) -> Figure:
    """Training and validation loss against tokens, with the unigram entropy and the loss of a uniform guess."""
    # Empty where the weights were loaded.
    train = results.table("train/train.csv", ["tokens", "loss"], may_be_empty=True)
    validation = results.table("train/eval.csv", ["tokens", "val_loss"])
    colour, uniform = NORM_COLOURS[results.norm], math.log(results.value("tokens.vocab_size"))
    figure, (axes,) = make_panels(1, 4.0)
    axes.plot(train["tokens"], train["loss"], color=colour, alpha=0.45, linewidth=1, label="training")
    axes.plot(validation["tokens"], validation["val_loss"], "o-", color=colour, markersize=4, label="validation")
    draw_level(axes, results.value("train.unigram_entropy"), "unigram entropy")
    draw_level(axes, uniform, "uniform guess, ln(vocabulary)", ":")
    if results.value("train.diverged"):
        tokens = results.value("train.diverged_at_step") * results.value("train.tokens_per_step")
        axes.axvline(tokens, color=INK, linestyle="-.", linewidth=1, label="diverged")
    # A diverging run would hide all other losses.
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.25 * uniform))
    axes.set(xlabel="Tokens seen", ylabel="Loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    return add_legend(figure)


def plot_benchmark(results: Results) -> Figure:
    """Benchmark accuracy along training with its standard error, and chance."""
    table = results.table("train/eval.csv", ["tokens", "hellaswag_acc", "hellaswag_acc_norm"])
    items, acc_norm = results.value("train.hellaswag_items"), table["hellaswag_acc_norm"]
    stderr = 100 * np.sqrt(acc_norm * (1 - acc_norm) / (items - 1))
    style: dict[str, Any] = {"color": NORM_COLOURS[results.norm], "markersize": 4, "elinewidth": 1}
    figure, (axes,) = make_panels(1, 3.6)
    axes.plot(table["tokens"], 100 * table["hellaswag_acc"], "s-", color=GREY, markersize=3, linewidth=1, label="acc")
    axes.errorbar(table["tokens"], 100 * acc_norm, stderr, fmt="o-", label="acc_norm ± standard error", **style)
    draw_level(axes, 100 * HELLASWAG_CHANCE, "chance")
    axes.set(xlabel="Tokens seen", ylabel=f"Benchmark accuracy (% of {items:,} items)")
    axes.xaxis.set_major_formatter(EngFormatter())
    return add_legend(figure)


def plot_layers(results: Results) -> Figure:
    """Gradient norm of each layer and activations after it, at up to MAX_STEPS of the logged steps."""
    labels = {"grad_norm": "Gradient norm before clipping", "activation_norm": "Residual stream (root mean square)"}
    table = results.table("train/layers.csv", ["step", "layer", *labels], may_be_empty=True)
    logged, layers = table["step"].unique(), table["layer"].unique()
    steps = logged[np.unique(np.linspace(0, len(logged) - 1, min(MAX_STEPS, len(logged))).round().astype(int))]
    figure, panels = make_panels(2, 3.6)
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for step, colour in zip(steps, colour_ramp(len(steps)), strict=True):
            rows = table[table["step"] == step]
            axes.plot(rows["layer"], rows[column], "o-", color=colour, markersize=3, label=f"step {step:,}")
        axes.set_xticks(layers, ["emb." if layer == names.EMBEDDINGS else layer for layer in layers])
        axes.set(xlabel="Layer", ylabel=label)
        scale_log(axes)
    return add_legend(figure)


def plot_replicates(results: Results) -> Figure:
    """A panel per headline figure: every model as a point, the main one filled, and mean with 95 % t interval."""
    models, style = load_models(results), dict[str, Any](color=NORM_COLOURS[results.norm], markersize=5)
    rows = math.ceil(len(models.columns) / 4)
    figure, panels = make_panels(4, 0.5 + 1.9 * rows, rows)
    for axes, (metric, values) in zip(panels, models.items(), strict=False):
        # A fixed jitter separates equal values.
        places = 0.12 * np.sin(2.4 * np.arange(len(values))) - 0.25
        axes.plot(places[:1], values[:1], "o", label="main model", **style)
        if values.count() > 1:
            axes.plot(places[1:], values[1:], "o", markerfacecolor="none", label="replicates", **style)
            axes.vlines(0.25, *mean_interval(values.dropna().tolist()), color=INK, linewidth=1.5)
            axes.plot(0.25, values.mean(), "_", color=INK, markersize=14, label="mean and 95 % interval")
        axes.set_title("\n".join(textwrap.wrap(names.HEADLINES[str(metric)], 26)), size=7)
        axes.set(xlim=(-0.6, 0.6), xticks=[])
    for axes in panels[len(models.columns) :]:
        axes.set_visible(False)
    return add_legend(figure)


def plot_norm_study(results: Results) -> Figure:
    """Loss and gradient norm of each run of the main arm with running medians: a column per rate, a row per warm-up."""
    runs = results.table("norm_study/runs.csv", [*RUN, "diverged_at_step"])
    curves = results.table("norm_study/curves.csv", [*RUN, "step", "loss", "grad_norm"], may_be_empty=True)
    runs, curves = (frame[frame["arm"] == names.MAIN_ARM] for frame in (runs, curves))
    entropy = results.value("norm_study.unigram_entropy")
    max_lrs, warmups = (sorted(runs[name].unique()) for name in ("max_lr", "warmup_steps"))
    figure, panels = make_panels(len(max_lrs), 2.9 * len(warmups) + 0.6, rows=2 * len(warmups))
    losses, gradients = np.array(panels).reshape(2, len(warmups), len(max_lrs))
    for (i, warmup), (j, max_lr) in itertools.product(enumerate(warmups), enumerate(max_lrs)):
        here = runs[(runs["max_lr"] == max_lr) & (runs["warmup_steps"] == warmup)]
        for grid, column, label in ((losses, "loss", "Loss (nats)"), (gradients, "grad_norm", "Gradient norm")):
            _draw_runs(grid[i, j], here, curves, column)
            grid[i, j].set_title(f"learning rate {max_lr:g}" if i == 0 else "", size=8)
            grid[i, j].set(xlabel="Step", ylabel=f"{label}\n{warmup:,} warm-up steps")
            grid[i, j].label_outer()
    for norm in runs["norm"].unique():
        panels[0].plot([], [], color=NORM_COLOURS[norm], label=norm)
    if (runs["diverged_at_step"] >= 0).any():
        panels[0].plot([], [], "x", color=INK, label="diverged")
    # As far above the entropy as the runs go below; the high first losses are alike.
    reach = max(0.1 * entropy, entropy - curves["loss"].quantile(0.05))
    for axes in losses.flat:
        draw_level(axes, entropy, "unigram entropy")
        axes.set_ylim(entropy - reach, entropy + reach)
    for axes in gradients.flat:
        scale_log(axes)
        if len(curves):
            # Single steps may be thousands of times above all others.
            axes.set_ylim(*curves["grad_norm"].quantile([0.001, 0.999]))
    return add_legend(figure)


def _draw_runs(axes: Axes, runs: pd.DataFrame, curves: pd.DataFrame, column: str) -> None:
    """A quantity of some runs along the steps, and a cross at the top where a run diverged."""
    for _, curve in runs.merge(curves, on=RUN).groupby(RUN, sort=False):
        colour = NORM_COLOURS[str(curve["norm"].iloc[0])]
        median = curve[column].rolling(1 + len(curve) // 10, center=True, min_periods=1).median()
        axes.plot(curve["step"], curve[column], color=colour, linewidth=0.4, alpha=0.15)
        axes.plot(curve["step"], median, color=colour, linewidth=1, alpha=0.85)
    diverged = runs[runs["diverged_at_step"] >= 0]
    for norm, step in zip(diverged["norm"], diverged["diverged_at_step"], strict=True):
        axes.plot(step, 0.95, "x", color=NORM_COLOURS[norm], transform=axes.get_xaxis_transform())


def plot_norm_stalls(results: Results) -> Figure:
    """Cosine between tokens and gradient of the first over the last block at the end of each run, a panel per arm."""
    columns = ["token_cosine", "grad_ratio", "stalled", "diverged"]
    runs = results.table("norm_study/runs.csv", ["arm", "norm", *columns])
    arms = runs["arm"].unique()
    figure, panels = make_panels(len(arms), 3.2)
    for axes, arm in zip(panels, arms, strict=True):
        for norm, rows in runs[runs["arm"] == arm].groupby("norm", sort=False):
            colour, lost = NORM_COLOURS[str(norm)], (rows["stalled"] > 0) | (rows["diverged"] > 0)
            for marker, part, name in (("o", rows[~lost], norm), ("x", rows[lost], None)):
                axes.plot(part["token_cosine"], part["grad_ratio"], marker, color=colour, markersize=5, label=name)
        axes.set(title=names.ARMS.get(arm, arm), xlabel="Cosine between tokens", xlim=(-0.05, 1.05), yscale="log")
        axes.set_ylim(runs["grad_ratio"].min() / 2, 2 * runs["grad_ratio"].max())
    panels[0].set_ylabel("Gradient, first over last block")
    panels[0].plot([], [], "x", color=INK, label="stalled or diverged")
    return add_legend(figure)


def plot_tokenizer(results: Results) -> Figure:
    """Tokens per word of each group, bytes per token and training cost per byte against vocabulary size."""
    table = load_vocabularies(results)
    panels_of = {
        "Tokens per word": {f"{group}_tokens_per_word": colour for group, colour in GROUP_COLOURS.items()},
        "Bytes per token": {"bytes_per_token": INK},
        "Training cost (MFLOPs per byte)": {"mflops_per_byte": INK},
    }
    figure, panels = make_panels(3, 3.3)
    for axes, (label, columns) in zip(panels, panels_of.items(), strict=True):
        for (column, colour), marker in zip(columns.items(), MARKERS, strict=False):
            name = column.removesuffix("_tokens_per_word") if len(columns) > 1 else None
            for own, rows in table.groupby("own"):
                style = {"linestyle": "-", "label": name} if own else {"linestyle": "", "markerfacecolor": "white"}
                axes.plot(rows["vocab_size"], rows[column], marker=marker, color=colour, markersize=5, **style)
        axes.set_ylabel(label)
        scale_vocabulary(axes, table["vocab_size"])
    return add_legend(figure)


def plot_bands(results: Results) -> Figure:
    """Tokens per word and words of three or more tokens, from very frequent words to unseen ones, by vocabulary."""
    labels = {"tokens_per_word": "Tokens per word", "words_in_three_or_more_percent": "Words of 3 or more tokens (%)"}
    table = results.table("tokenizer/bands.csv", ["name", "vocab_size", "band", *labels])
    table = table.sort_values("vocab_size", kind="stable")
    bands = table["band"].unique()
    own = table["name"].unique()[table["name"].unique() != names.GPT2_VOCABULARY]
    styles: dict[str, dict] = {name: {"color": colour} for name, colour in zip(own, colour_ramp(len(own)), strict=True)}
    styles[names.GPT2_VOCABULARY] = {"color": RED, "linestyle": "--", "markerfacecolor": "white"}
    figure, panels = make_panels(2, 3.7)
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for name, rows in table.groupby("name", sort=False):
            values = rows.set_index("band")[column].reindex(bands)
            axes.plot(range(len(bands)), values, marker="o", markersize=4, label=name, **styles[str(name)])
        axes.set_xticks(range(len(bands)), bands, rotation=30, ha="right", rotation_mode="anchor")
        axes.set(xlabel="Occurrences of the word in the training text", ylabel=label)
    return add_legend(figure, columns=4)


def plot_vocabulary_runs(results: Results) -> Figure:
    """Bits per byte of the small models against vocabulary: a line per budget, bars over the range of the seeds."""
    table = load_vocabulary_runs(results)
    budgets, uniform = list(table["budget"].unique()), table[table["own"]].drop_duplicates("vocab_size")
    figure, panels = make_panels(2, 3.6)
    for axes, (part, title) in zip(panels, {"": "all text", "rare_": "rare words"}.items(), strict=True):
        key = f"{part}bits_per_byte"
        for (budget, own), rows in table.groupby(["budget", "own"]):
            place = budgets.index(budget)
            style: dict[str, Any] = {"color": colour_ramp(len(budgets), 0.35)[place], "markersize": 5, "elinewidth": 1}
            style |= {"linestyle": "-", "label": f"{budget:.3g} FLOPs"} if own else {"linestyle": "", "mfc": "white"}
            spread = (rows[key] - rows[f"{key}_low"], rows[f"{key}_high"] - rows[key])
            axes.errorbar(rows["vocab_size"], rows[key], spread, marker=MARKERS[place % 6], capsize=2, **style)
        axes.plot(uniform["vocab_size"], uniform[f"{part}even_bits_per_byte"], ":", color=GREY, label="uniform guess")
        axes.set_title(title)
        scale_vocabulary(axes, table["vocab_size"].unique())
    panels[0].set_ylabel("Bits per byte of held-out text")
    return add_legend(figure)


def plot_heads(results: Results) -> Figure:
    """Cosine similarity of the patterns of all pairs of heads, with lines between the layers."""
    matrix = results.table("head_similarity/matrix.csv", ["head"]).set_index("head")
    figure, (axes,) = make_panels(1, 7.0)
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label="Cosine similarity of patterns")
    # Heads are named like l0h0.
    heads = matrix.index.str.extract(r"l(\d+)h", expand=False).astype(int).value_counts(sort=False)
    ends = np.cumsum(heads)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
        axes.axvline(end - 0.5, color="white", linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ends - heads / 2 - 0.5, heads.index)
    axes.set(xlabel="Heads by layer", ylabel="Heads by layer")
    axes.grid(False)
    return figure


def plot_head_nulls(results: Results) -> Figure:
    """Cosines of all pairs by layer, of the model and its null models, of raw and of centred patterns."""
    ends = {"": "raw patterns", "_centred": "centred patterns"}
    columns = ["similarity", "centred", *(f"{null}{end}" for null in NULL_COLOURS for end in ends)]
    pairs = results.table("head_similarity/pairs.csv", ["layer", *columns])
    figure, panels = make_panels(2, 3.9)
    for axes, (end, title) in zip(panels, ends.items(), strict=True):
        drawn = {end.removeprefix("_") or "similarity": ("trained model, text", NORM_COLOURS[results.norm])}
        drawn |= {f"{null}{end}": style for null, style in NULL_COLOURS.items()}
        for place, (column, (name, colour)) in zip((-0.25, 0, 0.25), drawn.items(), strict=True):
            # A fixed jitter separates equal values.
            places = pairs["layer"] + place + 0.08 * np.sin(np.arange(len(pairs)))
            axes.plot(places, pairs[column], "o", color=colour, markersize=1.5, alpha=0.5)
            means = pairs.groupby("layer")[column].mean()
            axes.hlines(means, means.index + place - 0.11, means.index + place + 0.11, color=INK, linewidth=1.2)
            axes.plot([], [], "o", color=colour, markersize=4, label=name)
        for null, (name, colour) in NULL_COLOURS.items():
            level = results.value(f"heads.{null}{end}_threshold")
            draw_level(axes, level, f"null threshold, {name}", ":", colour)
        axes.plot([], [], "_", color=INK, markersize=9, label="mean of a layer")
        if not end:
            draw_level(axes, results.value("heads.threshold"), "threshold of the reference")
        axes.set(title=title, xlabel="Layer", xticks=pairs["layer"].unique())
    panels[0].set_ylabel("Cosine similarity of two heads of a layer")
    return add_legend(figure, columns=4)


def plot_prune(results: Results) -> Figure:
    """Rise of perplexity against the share of heads removed: left without repair, right with it."""
    ranges = [f"{name}_{end}" for name in ("random", "random_refit") for end in ("low", "high")]
    table = results.table("prune/frontier.csv", ["heads_removed_percent", *CRITERIA, *REPAIRED, *ranges])
    removed = table["heads_removed_percent"]
    rise = 100 * (table[[*CRITERIA, *REPAIRED, *ranges]] / results.value("prune.baseline_perplexity") - 1)
    figure, panels = make_panels(2, 4.2)
    for axes, (title, columns) in zip(
        panels, {"without repair": CRITERIA, "with repair": REPAIRED}.items(), strict=True
    ):
        for column in columns:
            criterion, repair = split_pruning(column)
            style: dict[str, Any] = {"color": CRITERION_COLOURS[criterion], "linestyle": REPAIR_LINES[repair]}
            style |= {"marker": MARKERS[list(CRITERIA).index(criterion)], "markersize": 4}
            axes.plot(removed, rise[column], label=CRITERIA[criterion] if repair == "none" else None, **style)
            if criterion == "random":
                low, high = rise[f"{column}_low"], rise[f"{column}_high"]
                axes.fill_between(removed, low, high, color=GREY, alpha=0.2, linewidth=0)
        draw_level(axes, MAX_RISE_PERCENT, f"{MAX_RISE_PERCENT} %" if columns is REPAIRED else "")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks(RISES, [f"{rise:,}" for rise in RISES])
        axes.minorticks_off()
        axes.set_ylim(min(-1, 1.2 * np.nanmin(rise)), max(12, 1.2 * np.nanmax(rise)))
        axes.set(title=title, xlabel="Heads removed (%)")
    for repair in REPAIRS.values():
        panels[1].plot([], [], linestyle=REPAIR_LINES[repair], color=INK, label=repair)
    panels[0].set_ylabel("Rise of perplexity (%)")
    return add_legend(figure, columns=5)


def plot_prunability(results: Results) -> Figure:
    """Rise of the loss without each head alone, against two similarities and its Taylor importance."""
    labels = {"similarity": "Highest cosine of patterns", "ov": "Highest cosine of W_OV", "taylor": "Taylor importance"}
    table = results.table("prune/heads.csv", ["layer", *labels, "loss_rise"])
    figure, panels = make_panels(3, 3.4)
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        points = axes.scatter(table[name], table["loss_rise"], c=table["layer"], cmap="viridis", s=18)
        draw_level(axes, 0)
        value, low, high = (results.value(f"prune.{name}_rank_correlation{end}") for end in ("", "_low", "_high"))
        axes.set(title=f"rank correlation {value:+.2f}\n[{low:+.2f}, {high:+.2f}]", xlabel=label)
    panels[0].set_ylabel("Rise of loss without the head (nats)")
    figure.colorbar(points, ax=panels, label="Layer", ticks=sorted(set(table["layer"])))
    return figure


def plot_similarities(results: Results) -> Figure:
    """Rise of perplexity by similarity: left at 15 % with the range of random sets, right at all counts."""
    table = results.table("prune/similarities.csv", ["order", "heads_removed", "rise_percent", "low", "high"])
    frontier = results.table("prune/frontier.csv", ["heads_removed", "random", "random_low", "random_high"])
    claimed, heads = results.value("prune.heads_removed_at_15"), results.value("heads.heads")
    colours = dict(zip(SIMILARITIES, SIMILARITY_COLOURS, strict=True))
    figure, (ranking, curves) = make_panels(2, 4.4)
    at_15 = table[table["heads_removed"] == claimed].sort_values("rise_percent", ascending=False)
    ranking.hlines(range(len(at_15)), at_15["low"], at_15["high"], at_15["order"].map(colours))
    ranking.scatter(at_15["rise_percent"], range(len(at_15)), c=at_15["order"].map(colours), s=25)
    ranking.set_yticks(range(len(at_15)), at_15["order"].map(SIMILARITIES))
    random = "prune.random_sets_{}perplexity_rise_percent_at_15"
    mean, low, high = (results.value(random.format(end)) for end in ("", "low_", "high_"))
    ranking.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, label="random, mean and range")
    ranking.axvline(mean, color=GREY, linestyle="--", linewidth=1)
    ranking.axvline(MAX_RISE_PERCENT, color=INK, linestyle="--", linewidth=0.8, label=f"{MAX_RISE_PERCENT} %")
    ranking.set_xlabel("Rise of perplexity without 15 % of the heads (%)")
    ranking.grid(False)
    for order, rows in table.groupby("order"):
        curves.plot(100 * rows["heads_removed"] / heads, rows["rise_percent"], color=colours[str(order)], linewidth=1.2)
    rises = 100 * (frontier[["random_low", "random_high"]] / frontier["random"].iloc[0] - 1)
    removed = 100 * frontier["heads_removed"] / heads
    curves.fill_between(removed, rises["random_low"], rises["random_high"], color=GREY, alpha=0.2, linewidth=0)
    draw_level(curves, MAX_RISE_PERCENT)
    curves.set(xlabel="Heads removed (%)", ylabel="Rise of perplexity (%)")
    return add_legend(figure)


def plot_prune_speed(results: Results) -> Figure:
    """Perplexity of pruned models against their measured rates: prefill and decoding, one sequence and a batch."""
    columns = {"redundancy": "by redundancy", "redundancy_merge_refit": "with merge and stepwise refit"}
    table, speed = results.table("prune/frontier.csv", ["heads_removed", *columns]), results.speed("prune")
    figure, panels = make_panels(2, 5.2, rows=2)
    for axes, (rate, label) in zip(panels, names.PRUNED_RATES.items(), strict=True):
        rates = [speed[f"heads_removed_{count}_{rate}"] for count in table["heads_removed"]]
        for (column, name), line in zip(columns.items(), ("o-", "s--"), strict=True):
            axes.plot(rates, table[column], line, color=RED, markersize=4, label=name)
        for count, x, y in zip(table["heads_removed"], rates, table["redundancy"], strict=True):
            axes.annotate(count, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
        saved = (speed[f"pruned_{rate}"], results.value("prune.pruned_perplexity"))
        axes.plot(*saved, "*", color=GREEN, markersize=10, label="saved model")
        axes.set(xlabel=label, ylabel="Perplexity")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return add_legend(figure)


FIGURES: Drawings = {
    "replicates": plot_replicates, "loss": plot_loss, "benchmark": plot_benchmark, "layers": plot_layers,
    "norm_study": plot_norm_study, "norm_stalls": plot_norm_stalls, "tokenizer": plot_tokenizer, "bands": plot_bands,
    "vocabulary_runs": plot_vocabulary_runs, "heads": plot_heads, "head_nulls": plot_head_nulls,
    "prunability": plot_prunability, "prune": plot_prune, "similarities": plot_similarities,
}  # fmt: skip
# Drawn from measured times, which no second run repeats.
TIMED_FIGURES: Drawings = {"prune_speed": plot_prune_speed}
