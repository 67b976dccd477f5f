"""The figures of the report, each drawn from metrics and curves alone; the same files give the same bytes."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gpt2.files import atomic_path
from gpt2.measures import HELLASWAG_CHANCE, MAX_RISE_PERCENT, WORD_GROUPS, read_vocabularies, standard_error
from gpt2.results import Results

# Okabe and Ito's and Tol's colours, which people with any colour vision tell apart.
GREY, INK = "#8c8c8c", "#333333"
NORM_COLOURS = {"preln": "#0072b2", "postln": "#d55e00", "deepnorm": "#009e73"}
CRITERION_COLOURS = {"redundancy": "#cc79a7", "taylor": "#e69f00", "magnitude": "#56b4e9", "random": GREY}
GROUP_COLOURS = dict(zip(WORD_GROUPS, ("#332288", "#44aa99", "#aa4499"), strict=True))
MARKERS = "os^D"
WIDTH = 8.0  # inches; with DPI it is 1,200 pixels, half as much again as a README shows
DPI = 150
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


def draw_norm_study(results: Results) -> Figure:
    """Loss and gradient norm of all norms under the same learning rate, warm-up and seed, with running medians."""
    figure, panels = _panels(2, 3.6)
    runs = results.table("norm_study/runs.csv", ["norm", "diverged_at_step"])
    # The curves are those of the first run of each norm.
    shown = runs.groupby("norm", sort=False)["diverged_at_step"].first().to_dict()
    labels = {"loss": "Training loss (nats per token)", "grad_norm": "Gradient norm before clipping"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        table = results.table(f"norm_study/{name}.csv", ["step", *shown])
        for norm, diverged_at_step in shown.items():
            axes.plot(table["step"], table[norm], color=NORM_COLOURS[norm], linewidth=0.8, alpha=0.25)
            median = table[norm].rolling(1 + len(table) // 25, center=True, min_periods=1).median()
            median = median.where(table[norm].notna())
            axes.plot(table["step"], median, color=NORM_COLOURS[norm], linewidth=1.8, label=norm)
            if diverged_at_step >= 0:
                _fault(axes, diverged_at_step, NORM_COLOURS[norm])
        axes.set(xlabel="Step", ylabel=label)
    entropy = results.value("norm_study.unigram_entropy")
    _level(panels[0], entropy, "unigram entropy")
    _limit(panels[0], results.table("norm_study/loss.csv", [*shown])[[*shown]].to_numpy().ravel(), 1.3 * entropy)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_formatter(LogFormatter())
    panels[1].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    _legend(figure, panels[:1])
    return figure


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
        axes.set(xscale="log", xlabel="Vocabulary size (tokens)", ylabel=label)
        axes.set_xticks(table["vocab_size"], [f"{size / 1000:.3g}k" for size in table["vocab_size"]], rotation=45)
        axes.minorticks_off()
    lengths.plot([], [], "o", color=INK, markerfacecolor="white", label="GPT-2's own vocabulary")
    _legend(figure, [words, lengths])
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
    """Rise of perplexity against the share of heads removed, for each criterion."""
    columns = ["heads_removed_percent", *CRITERION_COLOURS, "random_low", "random_high"]
    table = results.table("prune/frontier.csv", columns)
    baseline = results.value("prune.baseline_perplexity")
    removed, rise = table["heads_removed_percent"], 100 * (table[columns[1:]] / baseline - 1)
    figure, (axes,) = _panels(1, 4.0)
    axes.fill_between(removed, rise["random_low"], rise["random_high"], color=GREY, alpha=0.2, linewidth=0)
    for (criterion, colour), marker in zip(CRITERION_COLOURS.items(), MARKERS, strict=True):
        axes.plot(removed, rise[criterion], f"{marker}-", color=colour, markersize=4, label=criterion)
    _level(axes, MAX_RISE_PERCENT, f"{MAX_RISE_PERCENT} %")
    axes.axvline(15, color=GREY, linestyle=":", linewidth=1, label="15 % of heads")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_yticks(RISES, [f"{rise:,}" for rise in RISES])
    axes.minorticks_off()
    axes.set_ylim(min(-1, 1.2 * np.nanmin(rise)), max(12, 1.2 * np.nanmax(rise)))
    axes.set(xlabel="Heads removed (%)", ylabel="Rise of perplexity (%)")
    _legend(figure, [axes])
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "loss": draw_loss,
    "benchmark": draw_benchmark,
    "norm_study": draw_norm_study,
    "tokenizer": draw_tokenizer,
    "heads": draw_heads,
    "prune": draw_prune,
}


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
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


def _level(axes: Axes, value: float, label: str, linestyle: str = "--") -> None:
    """A reference line across the panel."""
    axes.axhline(value, color=INK, linestyle=linestyle, linewidth=0.8, zorder=1, label=label)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend above the panels, where it hides no curve."""
    handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)


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
