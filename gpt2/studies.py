"""The sections of the report on what was studied: a sentence from the figures, the figure, the table, the verdicts."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from gpt2.claims import Row
from gpt2.markup import literal, number, table
from gpt2.measures import WORD_GROUPS, read_vocabularies, rise_at_15
from gpt2.results import Results

MAX_EXAMPLES = 12
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
    path = f"went from {number(losses.iloc[0])} to {number(last)}" if len(losses) > 1 else f"is {number(last)}"
    made = results.setting("benchmark", "source") == "heldout"
    benchmark = "The benchmark asks HellaSwag's question of passages from held-out documents." if made else ""
    return (
        f"The validation loss {path} nats per token after {number(results.value('train.tokens_seen'))} tokens, "
        f"{number(abs(entropy - last))} {'below' if last < entropy else 'above'} the unigram entropy of the training "
        f"tokens. The largest gradient norm was {number(results.value('train.max_grad_norm'))}, with "
        f"{number(results.value('train.loss_spikes'))} loss spikes. {benchmark}\n\n"
        f"![Loss against tokens]({figures['loss']})\n\n![Benchmark accuracy against tokens]({figures['benchmark']})"
    )


def describe_norms(results: Results, figures: Mapping[str, str]) -> str:
    """Every run of the norm study."""
    columns: Columns = {
        "norm": ("Norm", str),
        "max_lr": ("Learning rate", "{:g}".format),
        "warmup_steps": ("Warm-up steps", number),
        "seed": ("Seed", str),
        "val_loss": ("Validation loss", number),
        "loss_spikes": ("Spikes", number),
        "diverged_at_step": ("Diverged at step", lambda step: "-" if step < 0 else number(step)),
        "stalled": ("Stalled", lambda stalled: "yes" if stalled else "no"),
        "max_grad_norm": ("Largest gradient norm", number),
    }
    runs = results.table("norm_study/runs.csv", list(columns))
    finite = runs.dropna(subset=["val_loss"])
    lead = f"None of {len(runs)} runs has a finite validation loss."
    if len(finite):
        best = finite.loc[finite["val_loss"].idxmin()]
        lead = (
            f"Of {len(runs)} runs the lowest validation loss, {number(best['val_loss'])}, is that of {best['norm']} "
            f"at a learning rate of {best['max_lr']:g} with {number(best['warmup_steps'])} warm-up steps."
        )
    picture = f"![Loss and gradient norm of each norm]({figures['norm_study']})"
    return "\n\n".join((lead, picture, _frame(runs, columns)))


def describe_vocabularies(results: Results, figures: Mapping[str, str]) -> str:
    """Fragmentation of words, length of sequences and cost of training by vocabulary, and some words cut up."""
    columns: Columns = {
        "name": ("Vocabulary", str),
        "vocab_size": ("Size", number),
        "bytes_per_token": ("Bytes per token", number),
        **{f"{group}_tokens_per_word": (f"Tokens per {group} word", number) for group in WORD_GROUPS},
        "flops_per_byte": ("Training FLOPs per byte", number),
    }
    vocabularies = read_vocabularies(results)
    own = vocabularies[vocabularies["own"]]
    small, large = own.iloc[0], own.iloc[-1]
    tokens = _change(1 / small["bytes_per_token"], 1 / large["bytes_per_token"])
    cost = _change(small["flops_per_byte"], large["flops_per_byte"])
    lead = (
        f"From {number(small['vocab_size'])} to {number(large['vocab_size'])} tokens of vocabulary, the tokens of a "
        f"text change by {tokens} and the operations to train on it by {cost}. GPT-2's own vocabulary was learned on "
        "another corpus and is left out of the comparison of sizes."
    )
    names = vocabularies["name"].tolist()
    examples = results.texts("tokenizer/examples.csv", ["word", "group", *names]).head(MAX_EXAMPLES)
    cuts = _frame(examples, {name: (name, literal) for name in ("word", "group", *names)})
    picture = f"![Fragmentation, sequence length and cost]({figures['tokenizer']})"
    return "\n\n".join((lead, picture, _frame(vocabularies, columns), "Bars mark where a word is cut:", cuts))


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
    return "\n\n".join((lead, picture, _frame(layers, columns), "The most similar pairs:", _frame(pairs, pair_columns)))


def describe_pruning(results: Results, figures: Mapping[str, str]) -> str:
    """Cost in perplexity of removing heads, by criterion, and what removing them saves."""
    sizes = ["params", "flops_per_token", "kv_cache_bytes_per_token"]
    frontier = results.table("prune/frontier.csv", ["heads_removed", *sizes]).set_index("heads_removed")
    removed = results.value("prune.heads_removed_at_15")
    saved = [f"{100 * (1 - frontier[size].loc[removed] / frontier[size].iloc[0]):.1f} %" for size in sizes]
    lead = (
        f"Removing {number(removed)} of {number(results.value('heads.heads'))} heads takes {saved[0]} of the "
        f"parameters, {saved[1]} of the operations per token and {saved[2]} of the key-value cache."
    )
    rows = [
        (
            criterion,
            f"{rise_at_15(results, criterion):+.2f} %",
            f"{number(results.value(f'prune.{prefix}max_pruned_percent_below_5'))} %",
        )
        for criterion, prefix in (
            ("redundancy", ""),
            *((name, f"{name}_") for name in ("taylor", "magnitude", "random")),
        )
    ]
    header = ("Heads chosen by", "Perplexity without 15 % of the heads", "Most heads for under 5 %")
    picture = f"![Rise of perplexity against heads removed]({figures['prune']})"
    return "\n\n".join((lead, picture, table(header, rows, "lrr")))


def describe_samples(results: Results) -> str:
    """What the model writes after a prompt, word for word."""
    samples = results.texts("generate/samples.csv", ["prompt", "text"])
    quotes = [f"> **{literal(prompt)}** {literal(text)}" for prompt, text in samples[["prompt", "text"]].values]
    return "\n\n".join(["The prompt is bold, the rest is the model's.", *quotes])


def list_verdicts(rows: Sequence[Row], study: str) -> str:
    """The claims of one study as a Markdown list."""
    chosen = [row for row in rows if row.claim.study == study]
    return "\n".join(f"- {row.claim.sentence}: **{row.verdict}** ({row.measured})." for row in chosen)


def _frame(frame: pd.DataFrame, columns: Columns) -> str:
    """A Markdown table of some columns; text stands left and numbers right."""
    align = "".join("r" if pd.api.types.is_numeric_dtype(frame[name]) else "l" for name in columns)
    cells = zip(*([write(value) for value in frame[name]] for name, (_, write) in columns.items()), strict=True)
    return table([heading for heading, _ in columns.values()], cells, align)


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
