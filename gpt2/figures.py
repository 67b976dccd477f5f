"""The figures of the report, each drawn from metrics and curves alone; the same files give the same bytes."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gpt2.files import atomic_path
from gpt2.measures import (
    CRITERIA,
    EMBEDDINGS,
    HELLASWAG_CHANCE,
    MAX_RISE_PERCENT,
    REFERENCE_ENCODING,
    REPAIRED,
    REPAIRS,
    WORD_GROUPS,
    name_pruning,
    read_vocabularies,
    read_vocabulary_runs,
    standard_error,
)
from gpt2.results import Results

# Okabe and Ito's and Tol's colours, which people with any colour vision tell apart.
GREY, INK = "#8c8c8c", "#333333"
NORM_COLOURS = {"preln": "#0072b2", "postln": "#d55e00", "deepnorm": "#009e73"}
CRITERION_COLOURS = {"redundancy": "#cc79a7", "taylor": "#e69f00", "magnitude": "#56b4e9", "random": GREY}
GROUP_COLOURS = dict(zip(WORD_GROUPS, ("#332288", "#44aa99", "#aa4499"), strict=True))
MARKERS = "os^D"
REPAIR_LINES = {"none": "-", "refit": "-", "stepwise refit": "-.", "merge": ":", "merge and stepwise refit": "--"}
PREDICTORS = {"similarity": "Highest similarity to a head of its layer", "taylor": "Taylor importance"}
WIDTH = 8.0  # inches; with DPI it is 1,200 pixels, half as much again as a README shows
DPI = 150
RUN = ["norm", "max_lr", "warmup_steps", "seed"]  # what tells the runs of the norm study apart
MAX_STEPS = 6  # as many lines in a panel as the eye tells apart
RISES = (-50, -20, -10, 0, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000, 100_000)


def write_figures(results: Results, folder: Path) -> dict[str, Path]:
    """Draw all figures into `folder`; their paths by name. Raises UserError if a file, key or column is missing."""
    paths = {}
    for name, draw in FIGURES.items():
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
    style = {"fmt": "o-", "color": colour, "markersize": 4, "elinewidth": 1}
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
    for (norm, *_), curve in runs.merge(curves, on=RUN).groupby(RUN, sort=False):
        median = curve[name].rolling(1 + len(curve) // 10, center=True, min_periods=1).median()
        axes.plot(curve["step"], curve[name], color=NORM_COLOURS[norm], linewidth=0.4, alpha=0.15)
        axes.plot(curve["step"], median, color=NORM_COLOURS[norm], linewidth=1, alpha=0.85)
    for run in runs[runs["diverged_at_step"] >= 0].itertuples():
        axes.plot(run.diverged_at_step, 0.95, "x", color=NORM_COLOURS[run.norm], transform=axes.get_xaxis_transform())


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
                style = {"markerfacecolor": "white", "markersize": 5, "label": "GPT-2's own vocabulary"}
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
    for axes, (part, label) in zip(panels, {"": "all text", "rare_": "rare words"}.items(), strict=True):
        key = f"{part}bits_per_byte"
        for budget, colour, marker in zip(budgets, colours, itertools.cycle(MARKERS)):
            for own, line in ((True, "-"), (False, "")):
                rows = table[(table["budget"] == budget) & (table["own"] == own)]
                spread = (rows[key] - rows[f"{key}_low"], rows[f"{key}_high"] - rows[key])
                style = {"color": colour, "markersize": 5, "elinewidth": 1, "capsize": 2, "linestyle": line}
                filled = {} if own else {"markerfacecolor": "white"}
                told = f"{budget:.3g} FLOPs" if own else None
                axes.errorbar(rows["vocab_size"], rows[key], spread, marker=marker, label=told, **style, **filled)
        even = table[table["own"]].drop_duplicates("vocab_size")
        axes.plot(even["vocab_size"], even[f"{part}even_bits_per_byte"], ":", color=GREY, label="all tokens alike")
        axes.set_title(label, size=9, color=INK)
        _vocabulary_axis(axes, table["vocab_size"].unique())
    panels[0].plot([], [], "o", color=INK, markerfacecolor="white", label="GPT-2's own vocabulary")
    panels[0].set_ylabel("Bits per byte of held-out text")
    _legend(figure, panels[:1])
    return figure


def draw_heads(results: Results) -> Figure:
    """Cosine similarity of the patterns of all heads, and each layer's highest and mean against an untrained model."""
    matrix = results.table("head_similarity/matrix.csv", ["head"]).set_index("head")
    columns = ["layer", "max_similarity", "mean_similarity", "untrained_mean"]
    layers = results.table("head_similarity/layers.csv", columns)
    figure, (picture, profile) = _panels(2, 3.9)
    image = picture.imshow(matrix.to_numpy(), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=picture, fraction=0.05)
    bar.set_label("Cosine similarity of patterns", size=9, color=INK)
    bar.ax.tick_params(color=GREY, labelcolor=INK, labelsize=8)
    # Heads are named like l0h0.
    heads = matrix.index.str.extract(r"l(\d+)h", expand=False).astype(int).value_counts(sort=False)
    ends = np.cumsum(heads)
    for end in ends[:-1]:
        picture.axhline(end - 0.5, color="white", linewidth=0.7)
        picture.axvline(end - 0.5, color="white", linewidth=0.7)
    centres = ends - heads / 2 - 0.5
    picture.set_xticks(centres, heads.index)
    picture.set_yticks(centres, heads.index)
    picture.set(xlabel="Heads by layer", ylabel="Heads by layer")
    picture.grid(False)
    colour = NORM_COLOURS[results.norm]
    profile.plot(layers["layer"], layers["max_similarity"], "o-", color=colour, label="highest pair")
    profile.plot(layers["layer"], layers["mean_similarity"], "s--", color=colour, label="mean of pairs")
    profile.plot(layers["layer"], layers["untrained_mean"], "^:", color=GREY, label="mean, untrained")
    _level(profile, results.value("heads.threshold"), "threshold")
    profile.set(xlabel="Layer", ylabel="Cosine similarity in the layer", xticks=layers["layer"], ylim=(0, 1.08))
    _legend(figure, [profile])
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
            marker, line = MARKERS[CRITERIA.index(criterion)], REPAIR_LINES[repair]
            # The legend tells criteria by the left panel, and repairs by their lines.
            label = criterion if repair == "none" else None
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
    _legend(figure, panels)
    return figure


def draw_prunability(results: Results) -> Figure:
    """Rise of the loss without each head alone, against its similarity and its Taylor importance."""
    table = results.table("prune/heads.csv", ["layer", "similarity", "taylor", "loss_rise"])
    figure, panels = _panels(2, 3.4)
    for axes, (name, label) in zip(panels, PREDICTORS.items(), strict=True):
        points = axes.scatter(table[name], table["loss_rise"], c=table["layer"], cmap="viridis", s=18)
        _level(axes, 0, "")
        value, low, high = (results.value(f"prune.{name}_rank_correlation{end}") for end in ("", "_low", "_high"))
        axes.set_title(f"rank correlation {value:+.2f} ({low:+.2f} to {high:+.2f})", size=9, color=INK)
        axes.set_xlabel(label)
    panels[0].set_ylabel("Rise of loss without the head (nats)")
    bar = figure.colorbar(points, ax=panels, label="Layer", ticks=sorted(set(table["layer"])))
    bar.ax.tick_params(labelsize=8)
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
    "prunability": draw_prunability,
    "prune": draw_prune,
}


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
    axes.set_xticks(sizes, [f"{size / 1000:.3g}k" for size in sizes], rotation=45)
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


def _legend(figure: Figure, panels: list[Axes], columns: int = 6) -> None:
    """One legend above the panels, where it hides no curve."""
    handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8)


def _fault(axes: Axes, position: float, colour: str = INK) -> None:
    """A vertical line where a run diverged."""
    axes.axvline(position, color=colour, linestyle=":", linewidth=1)
    place = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "left", "va": "top"}
    axes.annotate("diverged", (position, 0.97), fontsize=8, color=colour, **place)


def _limit(axes: Axes, losses: Iterable[float], top: float) -> None:
    """Keep the finite losses and `top` in sight, but those of an exploding run only up to a little over `top`."""
    finite = [*filter(math.isfinite, losses), top]
    low, high = min(finite), min(max(finite), 1.25 * top)
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)
