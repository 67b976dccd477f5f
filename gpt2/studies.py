"""The sections of the report on what was studied: a sentence from the figures, the figure, the table, the verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from gpt2.claims import Row
from gpt2.markup import literal, number, table
from gpt2.measures import (
    CRITERIA,
    EMBEDDINGS,
    REPAIRED,
    measure_pruning,
    most_below_5,
    name_pruning,
    name_setting,
    read_norm_settings,
    rise_at_15,
)
from gpt2.results import Results

MAX_PAIRS = 5
HEAD_FIGURES = (
    *("redundant_pairs", "redundant_heads", "heads", "mean_similarity"),
    *("untrained_redundant_pairs", "untrained_mean_similarity"),
)

# Of a column: its heading and how a value is written.
Columns = dict[str, tuple[str, Callable[..., str]]]


def describe_training(results: Results, figures: Mapping[str, str]) -> str:
    """Loss and benchmark along training."""
    losses = results.table("train/eval.csv", ["val_loss"])["val_loss"].dropna()
    last, entropy = results.value("train.val_loss"), results.value("train.unigram_entropy")
    side = "below" if last < entropy else "above"
    from_entropy = f"{number(abs(entropy - last))} {side} the unigram entropy of the training tokens"
    path = f"went from {number(losses.iloc[0])} to {number(last)}" if len(losses) > 1 else f"is {number(last)}"
    made = results.setting("benchmark", "source") == "heldout"
    benchmark = "The benchmark asks HellaSwag's question of passages from held-out documents." if made else ""
    pictures = (
        f"![Loss against tokens]({figures['loss']})\n\n![Benchmark accuracy against tokens]({figures['benchmark']})"
    )
    if results.loaded_from:
        return (
            f"No step was taken: the weights were loaded from {name_origin(results)}. Their validation loss is "
            f"{number(last)} nats per token, {from_entropy}; on as many tokens of the training split it is "
            f"{number(results.value('train.train_loss'))}. {benchmark}\n\n{pictures}"
        )
    return (
        f"The validation loss {path} nats per token after {number(results.value('train.tokens_seen'))} tokens, "
        f"{from_entropy}. The largest gradient norm was {number(results.value('train.max_grad_norm'))}, with "
        f"{number(results.value('train.loss_spikes'))} loss spikes. {benchmark}\n\n{pictures}\n\n"
        f"{_tell_layers(results)}![Gradient and activation norm of each layer]({figures['layers']})"
    )


def name_origin(results: Results) -> str:
    """Where loaded weights come from: folder or model of the hub, commit, digest."""
    commit = f", commit `{results.value('train.init_commit')}`" if results.has("train.init_commit") else ""
    return f"`{results.value('train.init_from')}`{commit} (sha256 `{results.value('train.init_sha256')}`)"


def _tell_layers(results: Results) -> str:
    """A paragraph on the blocks at the last step at which their norms were logged; nothing if they never were."""
    columns = ["step", "layer", "grad_norm", "activation_norm"]
    layers = results.table("train/layers.csv", columns, may_be_empty=True).dropna()
    blocks = layers[layers["layer"] != EMBEDDINGS].set_index("layer")
    if blocks.empty:
        return ""
    last = blocks[blocks["step"] == blocks["step"].max()].sort_index()
    gradients, activations = last["grad_norm"], last["activation_norm"]
    return (
        f"At step {number(last['step'].iloc[0])} the gradient norm of a block is between {number(gradients.min())} "
        f"(layer {gradients.idxmin()}) and {number(gradients.max())} (layer {gradients.idxmax()}); the root mean "
        f"square of the residual stream goes from {number(activations.iloc[0])} after the first block to "
        f"{number(activations.iloc[-1])} after the last.\n\n"
    )


def describe_norms(results: Results, figures: Mapping[str, str]) -> str:
    """Which norm learns at which learning rate and warm-up, how the others fail, and what rescues them."""
    columns: Columns = {
        "max_lr": ("Learning rate", "{:g}".format),
        "warmup_steps": ("Warm-up steps", number),
        "norm": ("Norm", str),
        "seeds": ("Runs", number),
        "val_loss": ("Validation loss", number),
        "val_loss_low": ("Lowest", number),
        "val_loss_high": ("Highest", number),
        "loss_spikes": ("Spikes", number),
        "diverged": ("Diverged", number),
        "diverged_at_step": ("At step", lambda step: "-" if step < 0 else number(step)),
        "stalled": ("Stalled", number),
        "max_grad_norm": ("Largest gradient norm", number),
    }
    table = results.table("norm_study/table.csv", list(columns))
    settings = read_norm_settings(results)
    layers, steps = (results.setting("norm_study", key) for key in ("n_layer", "max_steps"))
    lead = (
        f"{number(settings['seeds'].sum())} models of {layers} layers, each trained for {number(steps)} steps. A run "
        "that ends no better than guessing every token by its frequency, at "
        f"{number(results.value('norm_study.unigram_val_loss'))} nats, has stalled."
    )
    finite = table.dropna(subset=["val_loss"])
    if len(finite):
        best = finite.loc[finite["val_loss"].idxmin()]
        lead += (
            f" The lowest mean loss, {number(best['val_loss'])}, is that of {best['norm']} at a learning rate of "
            f"{name_setting(best['max_lr'], best['warmup_steps'])}."
        )
    norms = "\n".join(_tell_norm(norm, rows) for norm, rows in settings.groupby("norm", sort=False))
    picture = f"![Loss and gradient norm of each norm]({figures['norm_study']})"
    # The norms stand together at each setting.
    ordered = table.sort_values(["max_lr", "warmup_steps"], kind="stable")
    return "\n\n".join((lead, norms, picture, frame(ordered, columns)))


def _tell_norm(norm: str, settings: pd.DataFrame) -> str:
    """A list item on one norm, with an item below for each learning rate and warm-up at which a run was in trouble."""
    learned = f"- **{norm}**: all runs learn in {(settings['lost'] == 0).sum()} of {len(settings)} settings"
    troubled = settings[settings["rough"] | (settings["lost"] > 0)]
    if troubled.empty:
        return f"{learned}, without a spike."
    items = (f"    - {_tell_trouble(row)}{_tell_rescue(row, settings)}." for row in troubled.itertuples())
    return "\n".join((f"{learned}. In trouble at a learning rate of", *items))


def _tell_trouble(row: NamedTuple) -> str:
    faults = {"diverged": row.diverged, "stalled": row.stalled}
    told = [f"{number(count)} of {number(row.seeds)} runs {fault}" for fault, count in faults.items() if count]
    if row.loss_spikes:
        told.append(f"{number(row.loss_spikes)} spike{'s' * (row.loss_spikes > 1)}")
    if not row.lost:
        told.append("all runs learn")
    return f"{name_setting(row.max_lr, row.warmup_steps)}: {', '.join(told)}"


def _tell_rescue(row: NamedTuple, settings: pd.DataFrame) -> str:
    """How many runs learn with a longer warm-up alone, and at a lower learning rate alone, as far as was tried."""
    if not row.lost:
        return ""
    longer = settings[(settings["max_lr"] == row.max_lr) & (settings["warmup_steps"] > row.warmup_steps)]
    lower = settings[(settings["warmup_steps"] == row.warmup_steps) & (settings["max_lr"] < row.max_lr)]
    cures = {
        "a longer warm-up": longer.sort_values("warmup_steps"),
        "a lower learning rate": lower.sort_values("max_lr", ascending=False),
    }
    told = []
    for cure, tried in cures.items():
        if tried.empty:
            continue
        # The nearest of the settings that lose fewest.
        best = tried.loc[tried["lost"].idxmin()]
        if best["lost"] >= row.lost:
            told.append(f"{cure} does not help")
            continue
        setting = name_setting(best["max_lr"], best["warmup_steps"])
        told.append(f"{cure} ({setting}) rescues {row.lost - best['lost']} of {row.lost}")
    return "".join(f"; {words}" for words in told)


def describe_heads(results: Results, figures: Mapping[str, str]) -> str:
    """Similarity of heads by layer against an untrained model, and the most similar pairs."""
    columns: Columns = {
        "layer": ("Layer", str),
        "redundant_pairs": ("Pairs above", number),
        "max_similarity": ("Highest", number),
        "mean_similarity": ("Mean", number),
        "mean_nosink": ("Mean without the first key", number),
        "untrained_mean": ("Mean, untrained", number),
    }
    layers = results.table("head_similarity/layers.csv", list(columns))
    pair_columns: Columns = {
        "layer": ("Layer", str),
        "head_a": ("Head", str),
        "head_b": ("Head", str),
        "similarity": ("Patterns", number),
        "nosink": ("Without the first key", number),
        "written": ("What they write", number),
    }
    pairs = results.table("head_similarity/pairs.csv", list(pair_columns)).nlargest(
        MAX_PAIRS, "similarity", keep="first"
    )
    figure = {key: number(results.value(f"heads.{key}")) for key in HEAD_FIGURES}
    lead = (
        f"{figure['redundant_pairs']} pairs of heads of one layer, formed by {figure['redundant_heads']} of "
        f"{figure['heads']} heads, have a cosine above {results.value('heads.threshold')}; an untrained model of this "
        f"shape has {figure['untrained_redundant_pairs']} such pairs. The mean cosine is {figure['mean_similarity']}, "
        f"untrained {figure['untrained_mean_similarity']}: the causal mask alone makes patterns alike."
    )
    picture = f"![Similarity of all heads and by layer]({figures['heads']})"
    return "\n\n".join((lead, picture, frame(layers, columns), "The most similar pairs:", frame(pairs, pair_columns)))


def describe_pruning(results: Results, figures: Mapping[str, str]) -> str:
    """Cost in perplexity of removing heads, by criterion and repair, and what removing them saves."""
    sizes = ["params", "flops_per_token", "kv_cache_bytes_per_token"]
    frontier = results.table("prune/frontier.csv", ["heads_removed", *sizes]).set_index("heads_removed")
    removed = results.value("prune.heads_removed_at_15")
    saved = [f"{100 * (1 - frontier[size].loc[removed] / frontier[size].iloc[0]):.1f} %" for size in sizes]
    lead = (
        f"Removing {number(removed)} of {number(results.value('heads.heads'))} heads takes {saved[0]} of the "
        f"parameters, {saved[1]} of the operations per token and {saved[2]} of the key-value cache."
    )
    repairs = (
        f"The repairs take no training, but {number(results.value('prune.calibration_tokens'))} tokens of the training "
        "split. Refit: what the removed heads wrote is regressed on the outputs of those that are left in the layer; "
        "stepwise, each layer also makes good what the layers before it lost. "
        "Merge: the value and output circuit of a removed head is folded into the head of the most similar pattern."
    )
    rows = [
        (
            *name_pruning(column),
            f"{rise_at_15(results, column):+.2f} %",
            "passed" if measure_pruning(results, column)[0] else "failed",
            f"{number(most_below_5(results, column))} %",
        )
        for column in sorted((*CRITERIA, *REPAIRED), key=lambda column: CRITERIA.index(name_pruning(column)[0]))
    ]
    header = ("Heads chosen by", "Repair", "Perplexity without 15 %", "Under 5 %", "Most heads for under 5 %")
    picture = f"![Rise of perplexity against heads removed, without and with repair]({figures['prune']})"
    single = f"![Rise of loss without each head against similarity and importance]({figures['prunability']})"
    return "\n\n".join((_tell_prunability(results), single, lead, picture, repairs, table(header, rows, "llrlr")))


def _tell_prunability(results: Results) -> str:
    """Whether a head that is like another, or unimportant by Taylor's score, costs little when it goes alone."""
    told, ends = {}, {}
    for name in ("similarity", "taylor"):
        value, *ends[name] = (results.value(f"prune.{name}_rank_correlation{end}") for end in ("", "_low", "_high"))
        told[name] = "{:+.2f} ({:+.2f} to {:+.2f})".format(value, *ends[name])
    low, high = ends["similarity"]
    verdict = "the interval holds 0, so that similarity does not tell which heads cost little"
    if low > 0 or high < 0:
        verdict = f"heads that are like another cost {'less' if high < 0 else 'more'}"
    return (
        "Each head was removed alone. The rank correlation of the rise of the loss with the head's highest similarity "
        f"to another one of its layer is {told['similarity']}, 95 % interval over heads in brackets: {verdict}. With "
        f"the Taylor importance it is {told['taylor']}."
    )


def describe_samples(results: Results) -> str:
    """What the model writes after a prompt, word for word."""
    samples = results.texts("generate/samples.csv", ["prompt", "text"])
    quotes = [f"> **{literal(prompt)}** {literal(text)}" for prompt, text in samples[["prompt", "text"]].values]
    return "\n\n".join(["The prompt is bold, the rest is the model's.", *quotes])


def list_verdicts(rows: Sequence[Row], study: str) -> str:
    """The claims of one study as a Markdown list."""
    chosen = [row for row in rows if row.claim.study == study]
    return "\n".join(f"- {row.claim.sentence}: **{row.verdict}** ({row.measured})." for row in chosen)


def frame(frame: pd.DataFrame, columns: Columns) -> str:
    """A Markdown table of some columns; text stands left and numbers right."""
    align = "".join("r" if pd.api.types.is_numeric_dtype(frame[name]) else "l" for name in columns)
    cells = zip(*([write(value) for value in frame[name]] for name, (_, write) in columns.items()), strict=True)
    return table([heading for heading, _ in columns.values()], cells, align)
