"""The figures of the report, each drawn from metrics and curves alone; the same files give the same bytes."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import AutoLocator, LogFormatter, MaxNLocator, StrMethodFormatter

from gpt2.pipeline.files import atomic_path
from gpt2.report.measures import (
    CRITERIA,
    EMBEDDINGS,
    HELLASWAG_CHANCE,
    MAX_RISE_PERCENT,
    PRUNED_RATES,
    REFERENCE_ENCODING,
    REPAIRED,
    REPAIRS,
    SIMILARITIES,
    WORD_GROUPS,
    name_pruning,
    read_vocabularies,
    read_vocabulary_runs,
    standard_error,
)
from gpt2.report.results import Results

# Okabe and Ito's and Tol's colours, which people with any colour vision tell apart.
GREY, INK = "#8c8c8c", "#333333"
NORM_COLOURS = {"preln": "#0072b2", "postln": "#d55e00", "deepnorm": "#009e73"}
CRITERION_COLOURS = {
    "redundancy": "#cc79a7",
    "taylor": "#e69f00",
    "taylor_iterative": "#d55e00",
    "magnitude": "#56b4e9",
    "random": GREY,
    "loss": "#009e73",
}
# Tol's muted scheme.
SIMILARITY_COLOURS = (
    *("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee"),
    *("#882255", "#44aa99", "#999933", "#aa4499", "#6f6f6f"),
)
GROUP_COLOURS = dict(zip(WORD_GROUPS, ("#332288", "#44aa99", "#aa4499"), strict=True))
NULL_COLOURS = {"shuffled": ("shuffled tokens", "#cc79a7"), "untrained": ("untrained model", GREY)}
MARKERS = "os^Dv*"
REPAIR_LINES = {"none": "-", "refit": "-", "stepwise refit": "-.", "merge": ":", "merge and stepwise refit": "--"}
PREDICTOR_LABELS = {
    "similarity": "Highest cosine of patterns",
    "ov": "Highest cosine of W_OV",
    "taylor": "Taylor importance",
}
WIDTH = 8.0  # inches; with DPI it is 1,200 pixels, half as much again as a README shows
DPI = 150
RUN = ["norm", "max_lr", "warmup_steps", "seed"]  # what tells the runs of the norm study apart
MAX_STEPS = 6  # as many lines in a panel as the eye tells apart
RISES = (-50, -20, -10, 0, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000, 100_000)


def write_figures(
    results: Results, folder: Path, drawings: Mapping[str, Callable[[Results], Figure]]
) -> dict[str, Path]:
    """Draw FIGURES or TIMED_FIGURES into `folder`; their paths by name.

    Raises UserError if a file, key or column is missing.
    """
    paths = {}
    for name, draw in drawings.items():
        paths[name] = folder / f"{name}.png"
        with atomic_path(paths[name]) as temporary:
            # The name of the software would bind the bytes to its version.
            draw(results).savefig(temporary, format="png", metadata={"Software": None})
    return paths


def draw_loss(results: Results) -> Figure:
    """Training and validation loss against tokens, with the losses of guessing by frequency and of guessing evenly."""
    # No step is trained where the weights were loaded.
    train = results.table("train/train.csv", ["tokens", "loss"], may_be_empty=True)
    evaluations = results.table("train/eval.csv", ["tokens", "val_loss"])
    figure, (axes,) = _panels(1, 4.0)
    unit = _token_axis(axes, evaluations["tokens"].max())
    colour = NORM_COLOURS[results.norm]
    axes.plot(train["tokens"] / unit, train["loss"], color=colour, alpha=0.45, linewidth=1, label="training")
    axes.plot(
        evaluations["tokens"] / unit, evaluations["val_loss"], "o-", color=colour, markersize=4, label="validation"
    )
    even = math.log(results.value("tokens.vocab_size"))
    entropy = results.value("train.unigram_entropy")
    _level(axes, entropy, "unigram entropy (frequencies alone)")
    _level(axes, even, "ln(vocabulary) (all tokens alike)", ":")
    if results.value("train.diverged"):
        _fault(axes, results.value("train.diverged_at_step") * results.value("train.tokens_per_step") / unit)
    _limit(axes, [*train["loss"], *evaluations["val_loss"], entropy], even)
    axes.set_ylabel("Loss (nats per token)")
    _legend(figure, [axes])
    return figure


def draw_benchmark(results: Results) -> Figure:
    """Benchmark accuracy along training with its standard error, and chance."""
    table = results.table("train/eval.csv", ["tokens", "hellaswag_acc", "hellaswag_acc_norm"])
    items = results.value("train.hellaswag_items")
    figure, (axes,) = _panels(1, 3.6)
    tokens = table["tokens"] / _token_axis(axes, table["tokens"].max())
    normed, colour = 100 * table["hellaswag_acc_norm"], NORM_COLOURS[results.norm]
    stderr = 100 * table["hellaswag_acc_norm"].map(lambda accuracy: standard_error(accuracy, items))
    axes.plot(tokens, 100 * table["hellaswag_acc"], "s-", color=GREY, markersize=3, linewidth=1, label="sum (acc)")
    axes.fill_between(tokens, normed - stderr, normed + stderr, color=colour, alpha=0.15, linewidth=0)
    # The bars repeat the band where a single evaluation leaves it without width.
    style: dict[str, Any] = {"fmt": "o-", "color": colour, "markersize": 4, "elinewidth": 1}
    axes.errorbar(tokens, normed, stderr, label="mean per token (acc_norm) ± standard error", **style)
    _level(axes, 100 * HELLASWAG_CHANCE, "chance")
    axes.set_ylabel(f"Benchmark accuracy (% of {items:,} items)")
    _legend(figure, [axes])
    return figure


def draw_layers(results: Results) -> Figure:
    """Gradient norm of each layer and activations after it, at up to MAX_STEPS of the logged steps."""
    columns = ["step", "layer", "grad_norm", "activation_norm"]
    table = results.table("train/layers.csv", columns, may_be_empty=True)
    logged, layers = table["step"].unique(), table["layer"].unique()
    steps = logged[np.unique(np.linspace(0, len(logged) - 1, min(MAX_STEPS, len(logged))).round().astype(int))]
    # From light to dark, without the end that would be lost on white.
    colours = colormaps["cividis_r"](np.linspace(0.15, 1, len(steps)))
    figure, panels = _panels(2, 3.6)
    labels = {"grad_norm": "Gradient norm before clipping", "activation_norm": "Activations (root mean square)"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for step, colour in zip(steps, colours, strict=True):
            rows = table[table["step"] == step]
            axes.plot(rows["layer"], rows[name], "o-", color=colour, markersize=3, label=f"step {step:,}")
        axes.set_xticks(layers, ["emb." if layer == EMBEDDINGS else layer for layer in layers])
        axes.set(xlabel="Layer", ylabel=label)
        _log_axis(axes)
    _legend(figure, panels[:1])
    return figure


def draw_norm_study(results: Results) -> Figure:
    """Loss and gradient norm of every run, faint, with running medians: a column a learning rate, a row a warm-up."""
    runs = results.table("norm_study/runs.csv", [*RUN, "diverged_at_step"])
    curves = results.table("norm_study/curves.csv", [*RUN, "step", "loss", "grad_norm"], may_be_empty=True)
    curves = runs.merge(curves, on=RUN)
    entropy = results.value("norm_study.unigram_entropy")
    max_lrs, warmups = (sorted(runs[name].unique()) for name in ("max_lr", "warmup_steps"))
    figure, panels = _panels(len(max_lrs), 2.9 * len(warmups) + 0.6, rows=2 * len(warmups))
    losses, gradients = np.array(panels).reshape(2, len(warmups), len(max_lrs))
    for (i, warmup), (j, max_lr) in itertools.product(enumerate(warmups), enumerate(max_lrs)):
        here = (runs["max_lr"] == max_lr) & (runs["warmup_steps"] == warmup)
        for axes, name in ((losses[i, j], "loss"), (gradients[i, j], "grad_norm")):
            _draw_runs(axes, runs[here], curves, name)
            axes.set_title(f"learning rate {max_lr:g}" if i == 0 else "", size=8, color=INK)
        losses[i, 0].set_ylabel(f"Training loss (nats)\n{warmup:,} warm-up steps")
        gradients[i, 0].set_ylabel(f"Gradient norm\n{warmup:,} warm-up steps")
    for norm in runs["norm"].unique():
        panels[0].plot([], [], color=NORM_COLOURS[norm], label=norm)
    if (runs["diverged_at_step"] >= 0).any():
        panels[0].plot([], [], "x", color=INK, label="diverged")
    # As far above the entropy as the runs go below: the first losses, far above, are alike.
    reach = max(0.1 * entropy, entropy - curves["loss"].quantile(0.05))
    for axes in losses.flat:
        _level(axes, entropy, "unigram entropy")
        axes.set_ylim(entropy - reach, entropy + reach)
    for axes in gradients.flat:
        _log_axis(axes)
        if len(curves):
            # A single step may be thousands of times above all others.
            axes.set_ylim(*curves["grad_norm"].quantile([0.001, 0.999]))
    for axes in panels[: -len(max_lrs)]:
        axes.tick_params(labelbottom=False)
    for axes in gradients[-1]:
        axes.set_xlabel("Step")
    _legend(figure, panels[:1])
    return figure


def _draw_runs(axes: Axes, runs: pd.DataFrame, curves: pd.DataFrame, name: str) -> None:
    """A quantity of some runs along the steps, and a cross at the top where a run diverged."""
    for _, curve in runs.merge(curves, on=RUN).groupby(RUN, sort=False):
        norm = str(curve["norm"].iloc[0])
        median = curve[name].rolling(1 + len(curve) // 10, center=True, min_periods=1).median()
        axes.plot(curve["step"], curve[name], color=NORM_COLOURS[norm], linewidth=0.4, alpha=0.15)
        axes.plot(curve["step"], median, color=NORM_COLOURS[norm], linewidth=1, alpha=0.85)
    diverged = runs[runs["diverged_at_step"] >= 0]
    for norm, step in zip(diverged["norm"], diverged["diverged_at_step"], strict=True):
        axes.plot(step, 0.95, "x", color=NORM_COLOURS[norm], transform=axes.get_xaxis_transform())


def draw_tokenizer(results: Results) -> Figure:
    """Tokens per word of each group, bytes per token and training cost per byte against vocabulary size."""
    table = read_vocabularies(results)
    table["mflops_per_byte"] = table["flops_per_byte"] / 1e6
    own, other = table[table["own"]], table[~table["own"]]
    figure, (words, lengths, costs) = _panels(3, 3.3)

    def draw(axes: Axes, column: str, colour: str, marker: str, label: str | None = None) -> None:
        axes.plot(own["vocab_size"], own[column], f"{marker}-", color=colour, markersize=5, label=label)
        axes.plot(other["vocab_size"], other[column], marker, color=colour, markerfacecolor="white", markersize=6)

    for (group, colour), marker in zip(GROUP_COLOURS.items(), MARKERS, strict=False):
        draw(words, f"{group}_tokens_per_word", colour, marker, group)
    draw(lengths, "bytes_per_token", INK, "o")
    draw(costs, "mflops_per_byte", INK, "o")
    for axes, label in zip(
        (words, lengths, costs), ("Tokens per word", "Bytes per token", "Training cost (MFLOPs per byte)"), strict=True
    ):
        axes.set_ylabel(label)
        _vocabulary_axis(axes, table["vocab_size"])
    lengths.plot([], [], "o", color=INK, markerfacecolor="white", label="GPT-2's own vocabulary")
    _legend(figure, [words, lengths])
    return figure


def draw_bands(results: Results) -> Figure:
    """Tokens per word and words in three or more tokens, from very frequent words to unseen ones, by vocabulary."""
    columns = ["name", "vocab_size", "band", "tokens_per_word", "words_in_three_or_more_percent"]
    table = results.table("tokenizer/bands.csv", columns)
    names = table.sort_values("vocab_size", kind="stable")["name"].unique().tolist()
    bands = table["band"].unique().tolist()
    own = [name for name in names if name != REFERENCE_ENCODING]
    colours = dict(zip(own, colormaps["cividis_r"](np.linspace(0.15, 1, len(own))), strict=True))
    figure, panels = _panels(2, 3.7)
    labels = {"tokens_per_word": "Tokens per word", "words_in_three_or_more_percent": "In three or more tokens (%)"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for name in names:
            rows = table[table["name"] == name].set_index("band")[column].reindex(bands)
            if name in colours:
                axes.plot(range(len(bands)), rows, "o-", color=colours[name], markersize=3, label=name)
            else:
                style: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5, "label": "GPT-2's own vocabulary"}
                axes.plot(range(len(bands)), rows, "D--", color=CRITERION_COLOURS["redundancy"], **style)
        axes.set_xticks(range(len(bands)), bands, rotation=30, ha="right", rotation_mode="anchor")
        axes.set(xlabel="Occurrences of the word in the training text", ylabel=label)
    _legend(figure, panels[:1], columns=4)
    return figure


def draw_vocabulary_runs(results: Results) -> Figure:
    """Bits per byte of the small models against vocabulary, a line a budget, bars from lowest to highest seed."""
    table = read_vocabulary_runs(results)
    budgets = table["budget"].unique()
    colours = colormaps["cividis_r"](np.linspace(0.35, 1, len(budgets)))
    figure, panels = _panels(2, 3.6)
    for axes, (part, title) in zip(panels, {"": "all text", "rare_": "rare words"}.items(), strict=True):
        key = f"{part}bits_per_byte"
        for budget, colour, marker in zip(budgets, colours, itertools.cycle(MARKERS)):
            for own, line in ((True, "-"), (False, "")):
                rows = table[(table["budget"] == budget) & (table["own"] == own)]
                spread = (rows[key] - rows[f"{key}_low"], rows[f"{key}_high"] - rows[key])
                style: dict[str, Any] = {
                    "color": colour,
                    "markersize": 5,
                    "elinewidth": 1,
                    "capsize": 2,
                    "linestyle": line,
                }
                style |= {} if own else {"markerfacecolor": "white"}
                label = f"{budget:.3g} FLOPs" if own else None
                axes.errorbar(rows["vocab_size"], rows[key], spread, marker=marker, label=label, **style)
        even = table[table["own"]].drop_duplicates("vocab_size")
        axes.plot(even["vocab_size"], even[f"{part}even_bits_per_byte"], ":", color=GREY, label="all tokens alike")
        axes.set_title(title, size=9, color=INK)
        _vocabulary_axis(axes, table["vocab_size"].unique())
    panels[0].plot([], [], "o", color=INK, markerfacecolor="white", label="GPT-2's own vocabulary")
    panels[0].set_ylabel("Bits per byte of held-out text")
    _legend(figure, panels[:1])
    return figure


def draw_heads(results: Results) -> Figure:
    """Cosine similarity of the patterns of all pairs of heads, with lines between the layers."""
    matrix = results.table("head_similarity/matrix.csv", ["head"]).set_index("head")
    figure, (axes,) = _panels(1, 7.0)
    image = _draw_cosines(axes, matrix.to_numpy())
    _cosine_bar(figure, image, [axes])
    # Heads are named like l0h0.
    heads = matrix.index.str.extract(r"l(\d+)h", expand=False).astype(int).value_counts(sort=False)
    ends = np.cumsum(heads)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
        axes.axvline(end - 0.5, color="white", linewidth=1)
    centres = ends - heads / 2 - 0.5
    axes.set_xticks(centres, heads.index)
    axes.set_yticks(centres, heads.index)
    axes.set(xlabel="Heads by layer", ylabel="Heads by layer")
    return figure


def draw_head_layers(results: Results) -> Figure:
    """Cosine similarity of the patterns within each layer: above the diagonal on text, below it on shuffled tokens."""
    pairs = results.table("head_similarity/pairs.csv", ["layer", "head_a", "head_b", "similarity", "shuffled"])
    threshold, layers = results.value("heads.threshold"), sorted(pairs["layer"].unique())
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = _panels(columns, 0.4 + rows * 7.6 / columns, rows)
    for axes, layer in zip(panels, layers, strict=False):
        here = pairs[pairs["layer"] == layer]
        n_heads = 1 + here["head_b"].max()
        cosines = np.full((n_heads, n_heads), np.nan)
        cosines[here["head_a"], here["head_b"]] = here["similarity"]
        cosines[here["head_b"], here["head_a"]] = here["shuffled"]
        image = _draw_cosines(axes, cosines)
        y, x = np.nonzero(cosines > threshold)
        axes.plot(x, y, ".", color=INK, markersize=3)
        axes.set_title(f"layer {layer}", size=9, color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(locator := AutoLocator())
            locator.set_params(integer=True)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    if (pairs[["similarity", "shuffled"]] > threshold).any(axis=None):
        panels[0].plot([], [], ".", color=INK, label=f"above {threshold}")
    _cosine_bar(figure, image, panels)
    figure.supxlabel("Head (above the diagonal on text, below it on shuffled tokens)", size=9, color=INK)
    figure.supylabel("Head", size=9, color=INK)
    _legend(figure, panels[:1])
    return figure


def draw_head_nulls(results: Results) -> Figure:
    """Cosines of all pairs of each layer beside the null models, with and without the first key, and the thresholds."""
    ends = {"": "all keys", "_nosink": "without the first key"}
    columns = ["similarity", "nosink", *(f"{null}{end}" for null in NULL_COLOURS for end in ends)]
    pairs = results.table("head_similarity/pairs.csv", ["layer", *columns])
    figure, panels = _panels(len(ends), 3.9)
    for axes, (end, title) in zip(panels, ends.items(), strict=True):
        drawn = {end.removeprefix("_") or "similarity": ("trained model, text", NORM_COLOURS[results.norm])}
        drawn |= {f"{null}{end}": (name, colour) for null, (name, colour) in NULL_COLOURS.items()}
        for place, (column, (name, colour)) in zip((-0.25, 0, 0.25), drawn.items(), strict=True):
            # Side by side, so that points of the same height are seen.
            spread = 0.08 * np.sin(np.arange(len(pairs)))
            axes.plot(pairs["layer"] + place + spread, pairs[column], "o", color=colour, markersize=1.5, alpha=0.5)
            means = pairs.groupby("layer")[column].mean()
            axes.hlines(means, means.index + place - 0.11, means.index + place + 0.11, color=INK, linewidth=1.2)
            axes.plot([], [], "o", color=colour, markersize=4, label=name)
        for null, (name, colour) in NULL_COLOURS.items():
            level = results.value(f"heads.{null}_threshold{end}")
            axes.axhline(level, color=colour, linestyle=":", linewidth=1.2, zorder=1, label=f"calibrated on {name}")
        axes.plot([], [], "_", color=INK, markersize=9, label="mean of a layer")
        _level(axes, results.value("heads.threshold"), "threshold of the reference")
        axes.set_title(title, size=9, color=INK)
        axes.set(xlabel="Layer", xticks=pairs["layer"].unique(), ylim=(0, 1.04))
    panels[0].set_ylabel("Cosine similarity of two heads of a layer")
    _legend(figure, panels[:1], columns=4)
    return figure


def draw_prune(results: Results) -> Figure:
    """Rise of perplexity against the share of heads removed: left without repair, right with it."""
    ranges = [f"{name}_{end}" for name in ("random", "random_refit") for end in ("low", "high")]
    table = results.table("prune/frontier.csv", ["heads_removed_percent", *CRITERIA, *REPAIRED, *ranges])
    baseline = results.value("prune.baseline_perplexity")
    removed, rise = table["heads_removed_percent"], 100 * (table[[*CRITERIA, *REPAIRED, *ranges]] / baseline - 1)
    figure, panels = _panels(2, 4.2)
    for axes, columns in zip(panels, (CRITERIA, REPAIRED), strict=True):
        for column in columns:
            criterion, repair = name_pruning(column)
            marker, line = MARKERS[list(CRITERIA).index(criterion)], REPAIR_LINES[repair]
            # The legend tells criteria by the left panel, and repairs by their lines.
            label = CRITERIA[criterion] if repair == "none" else None
            axes.plot(
                removed, rise[column], marker + line, color=CRITERION_COLOURS[criterion], markersize=4, label=label
            )
            if criterion == "random":
                low, high = rise[f"{column}_low"], rise[f"{column}_high"]
                axes.fill_between(removed, low, high, color=GREY, alpha=0.2, linewidth=0)
        limit = axes.axhline(MAX_RISE_PERCENT, color=INK, linestyle="--", linewidth=0.8, zorder=1)
        claimed = axes.axvline(15, color=GREY, linestyle=":", linewidth=1)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks(RISES, [f"{rise:,}" for rise in RISES])
        axes.minorticks_off()
        axes.set_ylim(min(-1, 1.2 * np.nanmin(rise)), max(12, 1.2 * np.nanmax(rise)))
        axes.set_xlabel("Heads removed (%)")
    for repair in REPAIRS.values():
        panels[1].plot([], [], REPAIR_LINES[repair], color=INK, label=repair)
    limit.set_label(f"{MAX_RISE_PERCENT} %")
    claimed.set_label("15 % of heads")
    panels[0].set_title("without repair", size=9, color=INK)
    panels[1].set_title("with repair", size=9, color=INK)
    panels[0].set_ylabel("Rise of perplexity (%)")
    _legend(figure, panels, columns=5)
    return figure


def draw_prunability(results: Results) -> Figure:
    """Rise of the loss without each head alone, against its similarity in two ways and its Taylor importance."""
    table = results.table("prune/heads.csv", ["layer", *PREDICTOR_LABELS, "loss_rise"])
    figure, panels = _panels(3, 3.4)
    for axes, (name, label) in zip(panels, PREDICTOR_LABELS.items(), strict=True):
        points = axes.scatter(table[name], table["loss_rise"], c=table["layer"], cmap="viridis", s=18)
        _level(axes, 0, "")
        value, low, high = (results.value(f"prune.{name}_rank_correlation{end}") for end in ("", "_low", "_high"))
        axes.set_title(f"rank correlation {value:+.2f}\n[{low:+.2f}, {high:+.2f}]", size=9, color=INK)
        axes.set_xlabel(label)
    panels[0].set_ylabel("Rise of loss without the head (nats)")
    bar = figure.colorbar(points, ax=panels, label="Layer", ticks=sorted(set(table["layer"])))
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_similarities(results: Results) -> Figure:
    """Rise of perplexity where redundancy goes by other similarities: at 15 % beside random sets, and at all counts."""
    columns = ["order", "heads_removed", "rise_percent", "low", "high"]
    table = results.table("prune/similarities.csv", columns)
    frontier = results.table("prune/frontier.csv", ["heads_removed", "random", "random_low", "random_high"])
    claimed, heads = results.value("prune.heads_removed_at_15"), results.value("heads.heads")
    figure, (ranking, curves) = _panels(2, 4.4)
    at_15 = table[table["heads_removed"] == claimed].set_index("order").loc[list(SIMILARITIES)]
    colours = dict(zip(SIMILARITIES, SIMILARITY_COLOURS, strict=True))
    ordered = at_15.sort_values("rise_percent", ascending=False)
    for place, (order, row) in enumerate(ordered.iterrows()):
        ranking.plot([row["low"], row["high"]], [place, place], color=colours[order], linewidth=1.5)
        ranking.plot(row["rise_percent"], place, "o", color=colours[order], markersize=5)
    ranking.set_yticks(range(len(ordered)), [SIMILARITIES[order] for order in ordered.index])
    mean, low, high = (
        results.value(f"prune.random_sets_{end}perplexity_rise_percent_at_15") for end in ("", "low_", "high_")
    )
    ranking.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, label="random, mean and range")
    ranking.axvline(mean, color=GREY, linestyle="--", linewidth=1)
    ranking.axvline(MAX_RISE_PERCENT, color=INK, linestyle="--", linewidth=0.8, label=f"{MAX_RISE_PERCENT} %")
    ranking.set_xlabel("Rise of perplexity without 15 % of the heads (%)")
    ranking.grid(False)
    for order in SIMILARITIES:
        rows = table[table["order"] == order]
        curves.plot(100 * rows["heads_removed"] / heads, rows["rise_percent"], "-", color=colours[order], linewidth=1.2)
    rises = 100 * (frontier[["random_low", "random_high"]].div(frontier["random"].iloc[0]) - 1)
    removed = 100 * frontier["heads_removed"] / heads
    curves.fill_between(removed, rises["random_low"], rises["random_high"], color=GREY, alpha=0.2, linewidth=0)
    curves.axhline(MAX_RISE_PERCENT, color=INK, linestyle="--", linewidth=0.8)
    curves.set(xlabel="Heads removed (%)", ylabel="Rise of perplexity (%)")
    _legend(figure, [ranking])
    return figure


def draw_prune_speed(results: Results) -> Figure:
    """Perplexity of pruned models against the rates measured of them: reading and writing, one sequence and a batch."""
    columns = {"redundancy": "by redundancy", "redundancy_merge_refit": "with merge and stepwise refit"}
    table, speed = results.table("prune/frontier.csv", ["heads_removed", *columns]), results.speed("prune")
    figure, panels = _panels(2, 5.2, rows=2)
    for axes, (rate, label) in zip(panels, PRUNED_RATES.items(), strict=True):
        rates = [speed[f"heads_removed_{count}_{rate}"] for count in table["heads_removed"]]
        for (column, name), line in zip(columns.items(), ("o-", "s--"), strict=True):
            axes.plot(rates, table[column], line, color=CRITERION_COLOURS["redundancy"], markersize=4, label=name)
        for count, x, y in zip(table["heads_removed"], rates, table["redundancy"], strict=True):
            axes.annotate(count, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
        saved = (speed[f"pruned_{rate}"], results.value("prune.pruned_perplexity"))
        axes.plot(*saved, "*", color=CRITERION_COLOURS["loss"], markersize=10, label="saved model")
        axes.set(xlabel=label, ylabel="Perplexity")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend(figure, panels[:1])
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "loss": draw_loss,
    "benchmark": draw_benchmark,
    "layers": draw_layers,
    "norm_study": draw_norm_study,
    "tokenizer": draw_tokenizer,
    "bands": draw_bands,
    "vocabulary_runs": draw_vocabulary_runs,
    "heads": draw_heads,
    "head_layers": draw_head_layers,
    "head_nulls": draw_head_nulls,
    "prunability": draw_prunability,
    "prune": draw_prune,
    "similarities": draw_similarities,
}
# Of measured times, which no second run gives again.
TIMED_FIGURES: dict[str, Callable[[Results], Figure]] = {"prune_speed": draw_prune_speed}


def _panels(count: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """`count` panels in each of `rows`, the upper rows first."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, count, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, labelcolor=INK, labelsize=8, which="both")
        axes.xaxis.label.set(size=9, color=INK)
        axes.yaxis.label.set(size=9, color=INK)
        axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _token_axis(axes: Axes, most: int) -> float:
    """Label the horizontal axis; tokens divided by the returned unit fit it."""
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "billions"), (1e6, "millions")) if most >= unit), (1e3, "thousands")
    )
    axes.set_xlabel(f"Tokens seen ({name})")
    return unit


def _vocabulary_axis(axes: Axes, sizes: Iterable[int]) -> None:
    """A horizontal axis of vocabulary sizes."""
    axes.set(xscale="log", xlabel="Vocabulary size (tokens)")
    axes.set_xticks([*sizes], [f"{size / 1000:.3g}k" for size in sizes], rotation=45)
    axes.minorticks_off()


def _log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with numbers as people write them."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainFormatter())
    axes.yaxis.set_minor_formatter(_PlainFormatter(minor_thresholds=(1.5, 0.5)))


class _PlainFormatter(LogFormatter):
    """Labels the ticks that matplotlib picks with 0.02 where it writes 2e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _level(axes: Axes, value: float, label: str, linestyle: str = "--") -> None:
    """A reference line across the panel."""
    axes.axhline(value, color=INK, linestyle=linestyle, linewidth=0.8, zorder=1, label=label)


def _draw_cosines(axes: Axes, matrix: np.ndarray) -> AxesImage:
    """A square matrix of cosines from 0 to 1 as colours; what is missing stays white."""
    axes.grid(False)
    return axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")


def _cosine_bar(figure: Figure, image: AxesImage, panels: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02)
    bar.set_label("Cosine similarity of patterns", size=9, color=INK)
    bar.ax.tick_params(color=GREY, labelcolor=INK, labelsize=8)


def _legend(figure: Figure, panels: list[Axes], columns: int = 6) -> None:
    """One legend above the panels, where it hides no curve."""
    handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8)


def _fault(axes: Axes, position: float, colour: str = INK) -> None:
    """A vertical line where a run diverged."""
    axes.axvline(position, color=colour, linestyle=":", linewidth=1)
    place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "left", "va": "top"}
    axes.annotate("diverged", (position, 0.97), fontsize=8, color=colour, **place)


def _limit(axes: Axes, losses: Iterable[float], top: float) -> None:
    """Keep the finite losses and `top` in sight, but those of an exploding run only up to a little over `top`."""
    finite = [*filter(math.isfinite, losses), top]
    low, high = min(finite), min(max(finite), 1.25 * top)
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)
