"""Curves with derived columns, as claims and figures use them too, and the tables that are computed from several."""

from collections.abc import Sequence
from importlib.metadata import version

import pandas as pd

from gpt2.report import names
from gpt2.report.markdown import literal, number, write_spread
from gpt2.report.names import CRITERIA, HEADLINES, pruning_prefix, split_pruning
from gpt2.report.results import MODELS, Results
from gpt2.report.verdicts import mean_interval

PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "pyarrow")


def load_vocabularies(results: Results) -> pd.DataFrame:
    """The vocabularies of the tokenizer study, smallest first; `own` is False for GPT-2's."""
    fragmentation = [f"{group}_tokens_per_word" for group in names.WORD_GROUPS]
    columns = ["name", "vocab_size", "bytes_per_token", "flops_per_byte", *fragmentation]
    table = results.table("tokenizer/vocabularies.csv", columns).sort_values("vocab_size", ignore_index=True)
    return table.assign(own=table["name"] != names.GPT2_VOCABULARY, mflops_per_byte=table["flops_per_byte"] / 1e6)


def load_vocabulary_runs(results: Results) -> pd.DataFrame:
    """The small models of the tokenizer study, a row per budget and vocabulary, smallest first.

    `own` is False for GPT-2's vocabulary. Bits per byte are NaN where a run diverged.
    """
    bits = [f"{part}bits_per_byte{end}" for part in ("", "rare_") for end in ("", "_low", "_high")]
    even = ["even_bits_per_byte", "rare_even_bits_per_byte"]
    columns = ["budget", "name", "vocab_size", "seeds", "steps", "bytes", *bits, *even]
    table = results.table("tokenizer/runs_table.csv", columns).sort_values(["budget", "vocab_size"], ignore_index=True)
    return table.assign(own=table["name"] != names.GPT2_VOCABULARY)


def load_models(results: Results) -> pd.DataFrame:
    """The HEADLINES of the main model, in the first row, and of its replicates: a column per metric."""
    return results.table(MODELS, [*HEADLINES])[[*HEADLINES]]


def write_interval(values: pd.Series) -> str:
    """The 95 % t interval of the mean; – for one value."""
    return "–" if values.count() < 2 else " to ".join(map(number, mean_interval(values.dropna().tolist())))


def tabulate_replicates(results: Results) -> pd.DataFrame:
    """Spread of the headline figures over models that differ in their seed: a row per metric."""
    models = load_models(results)
    rows = [
        (HEADLINES[str(metric)], number(values.iloc[0]), write_spread(values), write_interval(values), f"`{metric}`")
        for metric, values in models.items()
    ]
    columns = ["Figure", "Main model", "Mean ± SD (n)", "95 % interval of the mean", "Metric"]
    return pd.DataFrame(rows, columns=columns)


def summarise_norms(results: Results) -> pd.DataFrame:
    """Loss and number of runs that learned: a row per arm, learning rate and warm-up, a column per norm."""
    columns = ["arm", "max_lr", "warmup_steps", "norm", "seeds", "val_loss", "val_loss_sd", "diverged", "stalled"]
    table = results.table("norm_study/table.csv", columns)
    learned = table["seeds"] - table["diverged"] - table["stalled"]
    loss = table["val_loss"].map(number) + " ± " + table["val_loss_sd"].map("{:.2g}".format).replace("nan", "–")
    cells = loss + " (" + learned.astype(str) + " of " + table["seeds"].astype(str) + ")"
    pivot = table.assign(cell=cells).pivot(index=columns[:3], columns="norm", values="cell")
    pivot = pivot.loc[table["arm"].unique(), table["norm"].unique()].fillna("–").reset_index()
    pivot = pivot.assign(arm=pivot["arm"].replace(names.ARMS), max_lr=pivot["max_lr"].map("{:g}".format))
    return pivot.rename(columns={"arm": "Arm", "max_lr": "Learning rate", "warmup_steps": "Warm-up steps"})


def tabulate_norms(results: Results) -> pd.DataFrame:
    """The table of the norm study, with the norms next to each other at each learning rate and warm-up."""
    columns = ["arm", "max_lr", "warmup_steps", "diverged", "diverged_at_step"]
    table = results.table("norm_study/table.csv", columns)
    order = {arm: place for place, arm in enumerate(table["arm"].unique())}
    table = table.sort_values(columns[:3], kind="stable", key=lambda keys: keys.replace(order))
    steps = table["diverged_at_step"].astype(object).where(table["diverged"] > 0, "–")
    return table.assign(max_lr=table["max_lr"].map("{:g}".format), diverged_at_step=steps)


def tabulate_vocabulary_runs(results: Results) -> pd.DataFrame:
    """Bits per byte of the small models, and `best` where a vocabulary trained here has the fewest at its budget."""
    runs = load_vocabulary_runs(results)

    def spread(key: str) -> pd.Series:
        mean, low, high = (runs[f"{key}{end}"].map(number) for end in ("", "_low", "_high"))
        return mean + " (" + low + " to " + high + ")"

    fewest = runs["bits_per_byte"].where(runs["own"]).groupby(runs["budget"]).transform("min")
    return runs.assign(
        budget=runs["budget"].map("{:.3g}".format),
        megabytes=runs["bytes"] / 1e6,
        all_words=spread("bits_per_byte"),
        rare_words=spread("rare_bits_per_byte"),
        best=(runs["own"] & (runs["bits_per_byte"] == fewest)).map({True: "best", False: ""}),
    )


def tabulate_examples(results: Results) -> pd.DataFrame:
    """Words as each vocabulary segments them."""
    columns = ["word", "group", *load_vocabularies(results)["name"]]
    examples = results.texts("tokenizer/examples.csv", columns)[columns].map(literal)
    return examples.rename(columns={"word": "Word", "group": "Group"})


def list_prunings() -> list[tuple[str, str, str]]:
    """Criterion, repair and prefix of the metrics of each column of prune/frontier.csv, by criterion."""
    order = list(CRITERIA)
    prunings = [(*split_pruning(column), pruning_prefix(column)) for column in (*CRITERIA, *names.REPAIRED)]
    prunings.sort(key=lambda pruning: order.index(pruning[0]))
    return [(CRITERIA[criterion], repair, prefix) for criterion, repair, prefix in prunings]


def list_choices() -> list[tuple[str, str]]:
    """Label and prefix of the metrics of each choice of heads without repair: by criterion, then by similarity."""
    criteria = {name: label for name, label in CRITERIA.items() if name != "random"}
    similarities = {f"similarity_{name}": f"redundancy by {label}" for name, label in names.SIMILARITIES.items()}
    similarities.pop("similarity_redundancy")
    return [(label, pruning_prefix(column)) for column, label in (criteria | similarities).items()]


def tabulate_savings(results: Results) -> pd.Series:
    """What removing 15 % of the heads saves, in percent of each column of sizes."""
    sizes = ["params", "flops_per_token", "kv_cache_bytes_per_token"]
    frontier = results.table("prune/frontier.csv", ["heads_removed", *sizes]).set_index("heads_removed")[sizes]
    return 100 * (1 - frontier.loc[results.value("prune.heads_removed_at_15")] / frontier.iloc[0])


def tabulate_pruned_speed(results: Results) -> pd.DataFrame:
    """Measured rates, perplexity and size of models with fewer heads."""
    speed, saved = results.speed("prune"), results.value("prune.pruned_heads")
    models = results.table("prune/frontier.csv", ["heads_removed", "redundancy", "memory_bytes"])
    own = models[models["heads_removed"] == saved].assign(redundancy=results.value("prune.pruned_perplexity"))
    keys = [*(f"heads_removed_{count}" for count in models["heads_removed"]), "pruned"]
    # Peak memory is measured on a GPU only.
    rates = names.PRUNED_RATES | ({"peak_memory_gib": "Peak memory (GiB)"} if "pruned_peak_memory_gib" in speed else {})
    cells = {
        "Heads removed": [*map(number, models["heads_removed"]), f"{saved}, saved model"],
        "Perplexity": [*models["redundancy"], *own["redundancy"]],
        **{label: [speed[f"{key}_{rate}"] for key in keys] for rate, label in rates.items()},
        "Weights and KV cache (MiB)": [size / 2**20 for size in (*models["memory_bytes"], *own["memory_bytes"])],
    }
    return pd.DataFrame(cells)


def tabulate_times(results: Results, stages: Sequence[str]) -> pd.DataFrame:
    """Seconds, memory and rates of each stage, and the sum of the seconds."""
    # Single pruned models have a table of their own.
    apart = ("seconds", "peak_memory_gib", "heads_removed_", "pruned_")
    rows: list[tuple] = []
    for stage in stages:
        speed = results.speed(stage)
        others = ", ".join(f"{key} {number(value)}" for key, value in speed.items() if not key.startswith(apart))
        rows.append((stage.replace("_", "-"), speed["seconds"], speed["peak_memory_gib"], others))
    rows.append(("all", sum(row[1] for row in rows), "", ""))
    return pd.DataFrame(rows, columns=["Stage", "Seconds", "Peak memory (GiB)", "Other figures"])


def tabulate_setup(results: Results) -> pd.DataFrame:
    """Parameters of the model and of training, and versions of the packages."""
    cells = {f"{part}.{key}": value for part in ("model", "train") for key, value in results.settings[part].items()}
    cells |= {package: version(package) for package in PACKAGES}
    return pd.DataFrame([(f"`{key}`", f"`{value}`") for key, value in cells.items()], columns=["Parameter", "Value"])
