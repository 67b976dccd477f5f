"""The sections of the report on what was studied: a sentence from the figures, the figure, the table, the verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from gpt2.report.claims import Row
from gpt2.report.markdown import literal, number, table
from gpt2.report.measures import (
    CRITERIA,
    EMBEDDINGS,
    PREDICTOR_NAMES,
    PRUNED_RATES,
    REPAIRED,
    SIMILARITIES,
    cheaper_sets,
    measure_pruning,
    most_below_5,
    name_pruning,
    name_setting,
    read_norm_settings,
    rise_at_15,
    similarity_column,
    tell_rise,
)
from gpt2.report.results import Results

MAX_PAIRS = 5
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
        best = finite.nsmallest(1, "val_loss").iloc[0]
        lead += (
            f" The lowest mean loss, {number(best['val_loss'])}, is that of {best['norm']} at a learning rate of "
            f"{name_setting(best['max_lr'], best['warmup_steps'])}."
        )
    norms = "\n".join(_tell_norm(str(norm), rows) for norm, rows in settings.groupby("norm", sort=False))
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


def _tell_trouble(row: Any) -> str:
    faults = {"diverged": row.diverged, "stalled": row.stalled}
    told = [f"{number(count)} of {number(row.seeds)} runs {fault}" for fault, count in faults.items() if count]
    if row.loss_spikes:
        told.append(f"{number(row.loss_spikes)} spike{'s' * (row.loss_spikes > 1)}")
    if not row.lost:
        told.append("all runs learn")
    return f"{name_setting(row.max_lr, row.warmup_steps)}: {', '.join(told)}"


def _tell_rescue(row: Any, settings: pd.DataFrame) -> str:
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
        best = tried.nsmallest(1, "lost").iloc[0]
        if best["lost"] >= row.lost:
            told.append(f"{cure} does not help")
            continue
        setting = name_setting(best["max_lr"], best["warmup_steps"])
        told.append(f"{cure} ({setting}) rescues {row.lost - best['lost']} of {row.lost}")
    return "".join(f"; {words}" for words in told)


def describe_heads(results: Results, figures: Mapping[str, str]) -> str:
    """Similarity of heads by layer against two null models, in patterns, in what they write and in their circuits."""
    columns: Columns = {
        "layer": ("Layer", str),
        "redundant_pairs": ("Pairs above", number),
        "clusters": ("Clusters", lambda clusters: clusters if isinstance(clusters, str) else "–"),
        "max_similarity": ("Highest", number),
        "mean_similarity": ("Mean", number),
        "mean_nosink": ("Without the first key", number),
        "shuffled_mean": ("On shuffled tokens", number),
        "shuffled_redundant_pairs": ("Pairs above, shuffled", number),
        "untrained_mean": ("Untrained", number),
        "untrained_redundant_pairs": ("Pairs above, untrained", number),
        "mean_written": ("What they write", number),
        "mean_qk": ("W_QK", number),
        "mean_ov": ("W_OV", number),
    }
    layers = results.table("head_similarity/layers.csv", list(columns))
    pair_columns: Columns = {
        "layer": ("Layer", str),
        "head_a": ("Head", str),
        "head_b": ("Head", str),
        "similarity": ("Patterns", number),
        "nosink": ("Without the first key", number),
        "shuffled": ("On shuffled tokens", number),
        "written": ("What they write", number),
        "qk": ("W_QK", number),
        "ov": ("W_OV", number),
    }
    pairs = results.table("head_similarity/pairs.csv", list(pair_columns)).nlargest(
        MAX_PAIRS, "similarity", keep="first"
    )
    matrix, by_layer, nulls = (
        f"![{title}]({figures[name]})"
        for name, title in (
            ("heads", "Similarity of all pairs of heads"),
            ("head_layers", "Similarity within each layer, on text and on shuffled tokens"),
            ("head_nulls", "Similarity within each layer beside the null models"),
        )
    )
    threshold = results.value("heads.threshold")
    caption = (
        f"By layer: pairs with patterns of a cosine above {threshold}, the clusters that they form, and means over all "
        "pairs of the layer, of patterns unless the heading says otherwise. W_QK and W_OV are compared as matrices "
        "from residual stream to residual stream, with the norm beside them folded in and without biases."
    )
    return "\n\n".join((
        _tell_similarity(results), nulls, caption, frame(layers, columns), by_layer, "The most similar pairs:",
        frame(pairs, pair_columns), matrix,
    ))  # fmt: skip


def _tell_similarity(results: Results) -> str:
    """What was found on the reference's claim, what the null models say to it, and what the circuits have in common."""

    def value(key: str) -> float:
        return results.value(f"heads.{key}")

    def say(key: str) -> str:
        return number(value(key))

    pairs, percentile = value("same_layer_pairs"), value("null_percentile")
    return (
        f"{say('redundant_pairs')} of {number(pairs)} pairs of heads of one layer, formed by {say('redundant_heads')} "
        f"of {say('heads')} heads, have patterns with a cosine above {value('threshold')}, "
        f"{say('redundant_pairs_nosink')} without the first key; the mean is {say('mean_similarity')}, the highest "
        f"{say('max_similarity')}. Causal masks alone make patterns alike: an untrained model of this shape has "
        f"{say('untrained_redundant_pairs')} such pairs and a mean of {say('untrained_mean_similarity')}. Where the "
        "trained model reads the same tokens shuffled within their windows, there are "
        f"{say('shuffled_redundant_pairs')} and a mean of {say('shuffled_mean_similarity')}; the cosines of the pairs "
        f"have a rank correlation of {value('shuffled_rank_correlation'):+.2f} with those on text. Thresholds under "
        f"which {percentile:g} % of a null model's pairs lie are {say('untrained_threshold')} (untrained) and "
        f"{say('shuffled_threshold')} (shuffled): {say('pairs_above_untrained_threshold')} and "
        f"{say('pairs_above_shuffled_threshold')} pairs lie above them, and {pairs * (1 - percentile / 100):.1f} would "
        f"if the trained model on text were like its null. {_weigh_claim(results)}\n\n"
        f"The circuits of two heads of a layer have a mean cosine of {say('mean_qk_similarity')} and a highest of "
        f"{say('max_qk_similarity')} for W_QK, which scores queries against keys (untrained at most "
        f"{say('untrained_max_qk_similarity')}), {say('mean_ov_similarity')} and {say('max_ov_similarity')} for W_OV, "
        f"which moves values ({say('untrained_max_ov_similarity')}). Pairs with alike patterns and pairs with alike "
        f"W_QK have a rank correlation of {value('qk_rank_correlation'):+.2f}, pairs that write alike and pairs with "
        f"alike W_OV {value('ov_rank_correlation'):+.2f}."
    )


def _weigh_claim(results: Results) -> str:
    """The sentence that speaks for or against similar heads as a product of learning."""
    text, untrained, shuffled = (
        results.value(f"heads.{model}redundant_pairs") for model in ("", "untrained_", "shuffled_")
    )
    if not text:
        return "**Against the reference's claim**: no pair is that alike."
    if text <= untrained:
        return (
            "**Against the reference's claim**: such pairs exist, but training left no more of them than a model has "
            "that learned nothing."
        )
    if text <= shuffled:
        return (
            "**For the reference's claim with a reserve**: training made such pairs, but they are as many where there "
            "is no text to read, so positions and single tokens make them alike."
        )
    return "**For the reference's claim**: there are more such pairs than in either null model."


def describe_pruning(results: Results, figures: Mapping[str, str]) -> str:
    """Cost in perplexity of removing heads by criterion, repair and similarity, and what it saves."""
    sizes = ["params", "flops_per_token", "kv_cache_bytes_per_token"]
    frontier = results.table("prune/frontier.csv", ["heads_removed", *sizes]).set_index("heads_removed")
    removed = results.value("prune.heads_removed_at_15")
    saved = [f"{100 * (1 - frontier[size].loc[removed] / frontier[size].iloc[0]):.1f} %" for size in sizes]
    lead = (
        f"Removing {number(removed)} of {number(results.value('heads.heads'))} heads takes {saved[0]} of the "
        f"parameters, {saved[1]} of the operations per token and {saved[2]} of the key-value cache. In brackets is the "
        "95 % interval over windows of text, for random choices also over the choices. The greedy choice by loss tries "
        "every head at every step and is the expensive bound; iterative Taylor scores are taken again at each share."
    )
    repairs = (
        f"The repairs take no training, but {number(results.value('prune.calibration_tokens'))} tokens of the training "
        "split. Refit: what the removed heads wrote is regressed on the outputs of those that are left in the layer; "
        "stepwise, each layer also makes good what the layers before it lost. "
        "Merge: the value and output circuit of a removed head is folded into the head of the most similar pattern."
    )
    order = list(CRITERIA)
    rows = []
    for column in sorted((*CRITERIA, *REPAIRED), key=lambda column: order.index(name_pruning(column)[0])):
        criterion, repair = name_pruning(column)
        verdict = "passed" if measure_pruning(results, column)[0] else "failed"
        most = f"{number(most_below_5(results, column))} %"
        rows.append((CRITERIA[criterion], repair, tell_rise(results, column), verdict, most))
    header = ("Heads chosen by", "Repair", "Perplexity without 15 %", "Under 5 %", "Most heads for under 5 %")
    picture = f"![Rise of perplexity against heads removed, without and with repair]({figures['prune']})"
    single = f"![Rise of loss without each head against similarity and importance]({figures['prunability']})"
    return "\n\n".join(
        (
            *(_tell_prunability(results), single, lead, picture, repairs, table(header, rows, "llrlr")),
            *(_tell_similarities(results), f"![Rise of perplexity by similarity]({figures['similarities']})"),
            *(_tabulate_similarities(results), _tell_scores(results)),
        )
    )


def _tell_similarities(results: Results) -> str:
    """What was tried in place of redundancy, and which of it chooses no better than chance."""
    mean, low, high = (
        results.value(f"prune.random_sets_{end}perplexity_rise_percent_at_15") for end in ("", "low_", "high_")
    )
    worse = [name for order, name in SIMILARITIES.items() if rise_at_15(results, similarity_column(order)) >= mean]
    ahead = [name for order, name in SIMILARITIES.items() if not cheaper_sets(results, similarity_column(order))]
    return (
        f"Which similarity tells what can go, without repair? {number(results.value('prune.random_sets'))} random sets "
        f"of 15 % of the heads cost {mean:+.2f} % on average, {low:+.2f} to {high:+.2f} %. The rule of redundancy was "
        f"given other cosines than those of the patterns. Worse than the mean of random: {_list(worse)}. Better than "
        f"every random set: {_list(ahead)}. Of {len(SIMILARITIES)} orders that choose blindly one would come out ahead "
        f"of all sets with a chance of up to {_chance_of_one(results):.0f} %."
    )


def _chance_of_one(results: Results) -> float:
    """In percent, at most, that one of the orders beats all random sets if none is better than they are."""
    return min(100.0, 100 * len(SIMILARITIES) / (1 + results.value("prune.random_sets")))


def _list(names: Sequence[str]) -> str:
    return "; ".join(names) or "none"


def _tabulate_similarities(results: Results) -> str:
    """Each order at 15 %, the best first."""
    columns = ["order", "heads_removed", "above_random_percent", "above_random_low", "above_random_high"]
    orders = results.table("prune/similarities.csv", columns)
    orders = orders[orders["heads_removed"] == results.value("prune.heads_removed_at_15")].set_index("order")
    rows = []
    for order in sorted(SIMILARITIES, key=lambda order: rise_at_15(results, similarity_column(order))):
        above, low, high = orders.loc[order, columns[2:]]
        cheaper = number(cheaper_sets(results, similarity_column(order)))
        rise = tell_rise(results, similarity_column(order))
        rows.append((SIMILARITIES[order], rise, f"{above:+.2f} [{low:+.2f}, {high:+.2f}]", cheaper))
    header = ("Redundancy by", "Perplexity without 15 %", "Above random (points)", "Random sets that cost less")
    return table(header, rows, "lrrr")


def _tell_scores(results: Results) -> str:
    """Benchmark accuracy of the whole model and of two pruned ones."""

    def score(name: str) -> str:
        accuracy, stderr = (results.value(f"prune.{name}_hellaswag_acc_norm{end}") for end in ("", "_stderr"))
        return f"{100 * accuracy:.2f} ± {100 * stderr:.2f} %"

    def against(name: str) -> str:
        keys = ("difference", "difference_margin", "p")
        difference, margin, p = (results.value(f"prune.{name}_hellaswag_acc_norm_{key}") for key in keys)
        return f"{score(name)} ({100 * difference:+.2f} ± {100 * margin:.2f} points, p = {p:.2g})"

    return (
        f"On the benchmark (completion acc_norm) the whole model scores {score('whole')}, without 15 % of the heads by "
        f"redundancy {against('redundancy_at_15')}, and the saved model without "
        f"{number(results.value('prune.pruned_heads'))} heads {against('pruned')}: differences on the same items with "
        f"their 95 % intervals, p by McNemar's exact test.{_tell_recovery(results)}"
    )


def _tell_recovery(results: Results) -> str:
    """What training after the repair did, if there was any."""
    steps = results.value("prune.recovery_steps")
    if not steps:
        return ""
    before, after = (number(results.value(f"prune.pruned_perplexity{end}")) for end in ("_before_recovery", ""))
    return f" {number(steps)} steps of training took the saved model from a perplexity of {before} to {after}."


def describe_pruned_speed(results: Results, figures: Mapping[str, str]) -> str:
    """Measured rates of models with fewer heads, beside their perplexity."""
    speed = results.speed("prune")
    sizes = results.table("prune/frontier.csv", ["heads_removed", "redundancy", "memory_bytes"])
    models = [
        (f"heads_removed_{count}", number(count), perplexity, memory)
        for count, perplexity, memory in sizes[["heads_removed", "redundancy", "memory_bytes"]].to_numpy(object)
    ]
    saved = results.value("prune.pruned_heads")
    (bytes_saved,) = sizes.loc[sizes["heads_removed"] == saved, "memory_bytes"]
    models.append(("pruned", f"{number(saved)}, saved model", results.value("prune.pruned_perplexity"), bytes_saved))
    # Only a GPU tells what a single model took.
    rates = PRUNED_RATES | ({"peak_memory_gib": "Peak memory (GiB)"} if "pruned_peak_memory_gib" in speed else {})
    rows = [
        (name, number(perplexity), *(number(speed[f"{key}_{rate}"]) for rate in rates), number(size / 2**20))
        for key, name, perplexity, size in models
    ]
    header = ("Heads removed", "Perplexity", *rates.values(), "Weights and cache (MiB)")
    return "\n\n".join(
        (
            "Models without heads, by redundancy and as saved, read half of a context and write on, one sequence and a "
            "batch. Weights and cache are counted: in fp32, with the keys and values of one sequence at full context.",
            f"![Perplexity against measured tokens/s of pruned models]({figures['prune_speed']})",
            table(header, rows, "l" + "r" * (len(header) - 1)),
        )
    )


def _tell_prunability(results: Results) -> str:
    """Whether a head that is like another, or unimportant by Taylor's score, costs little when it goes alone."""
    rows: list[list[str]] = []
    telling: dict[str, list[str]] = {"": [], "_in_layer": []}
    for key, name in PREDICTOR_NAMES.items():
        cells = []
        for place in telling:
            metrics = (f"prune.{key}_rank_correlation{place}{end}" for end in ("", "_low", "_high"))
            value, low, high = map(results.value, metrics)
            cells.append(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
            # A head that is like another should cost little, an important one much.
            if low > 0 if key == "taylor" else high < 0:
                telling[place].append(name)
        rows.append([name, *cells])
    return (
        "Each head was removed alone. The table has the rank correlation of the rise of the loss with the head's "
        "highest similarity to another one of its layer, and with its Taylor importance; in brackets the 95 % interval "
        "over heads. Layers differ in both, so that within layers, where the mean of each is taken from the ranks, the "
        "sign may turn. The interval lies on the side that tells what can go, without 0, over all heads for: "
        f"{_list(telling[''])}. Within layers for: {_list(telling['_in_layer'])}.\n\n"
        + table(("Highest similarity by", "Rank correlation", "Within layers"), rows, "lrr")
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
