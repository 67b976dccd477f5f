"""The section of the report on the size of the vocabulary."""

from collections.abc import Mapping

import pandas as pd

from gpt2.report.markdown import literal, number, table
from gpt2.report.measures import REFERENCE_FLOPS, WORD_GROUPS, best_by_budget, read_vocabularies, read_vocabulary_runs
from gpt2.report.results import Results
from gpt2.report.sections import Columns, frame


def describe_vocabularies(results: Results, figures: Mapping[str, str]) -> str:
    """Fragmentation of words, length of sequences and cost of training by vocabulary; small models trained with each;
    what follows for GPT-2's choice; and some words cut up."""
    vocabularies, runs = read_vocabularies(results), read_vocabulary_runs(results)
    own = vocabularies[vocabularies["own"]]
    small, large = own.iloc[0], own.iloc[-1]
    tokens = _change(1 / small["bytes_per_token"], 1 / large["bytes_per_token"])
    cost = _change(small["flops_per_byte"], large["flops_per_byte"])
    lead = (
        f"From {number(small['vocab_size'])} to {number(large['vocab_size'])} tokens of vocabulary, the tokens of a "
        f"text change by {tokens} and the operations to train on it by {cost}. GPT-2's own vocabulary was learned on "
        "another corpus and is left out of the comparison of sizes."
    )
    text_columns: Columns = {
        "name": ("Vocabulary", str),
        "vocab_size": ("Size", number),
        "bytes_per_token": ("Bytes per token", number),
        "tokens_per_document": ("Tokens per document", number),
        "documents_in_context_percent": ("Documents that fit the context (%)", number),
        "renyi_efficiency": ("Rényi efficiency", number),
        "tokens_per_word": ("Tokens per word", number),
        "words_kept_whole_percent": ("Words kept whole (%)", number),
        "words_in_three_or_more_percent": ("In three or more (%)", number),
    }
    cost_columns: Columns = {
        "name": ("Vocabulary", str),
        **{f"{group}_tokens_per_word": (f"Tokens per {group} word", number) for group in WORD_GROUPS},
        "embedding_params": ("Embedding and output layer (parameters)", number),
        "embedding_params_percent": ("of all (%)", number),
        "logits_bytes": ("Logits of a context (MB)", lambda n_bytes: number(n_bytes / 1e6)),
        "flops_per_byte": ("Training FLOPs per byte", number),
    }
    names = vocabularies["name"].tolist()
    examples = results.texts("tokenizer/examples.csv", ["word", "group", *names])
    cuts = frame(examples, {name: (name, literal) for name in ("word", "group", *names)})
    parts = (
        lead,
        f"![Fragmentation, sequence length and cost]({figures['tokenizer']})",
        frame(vocabularies, text_columns),
        frame(vocabularies, cost_columns),
        _tell_bands(results, names[own.index[0]], names[own.index[-1]]),
        f"![Fragmentation by frequency of the word]({figures['bands']})",
        _tell_runs(results, runs),
        f"![Bits per byte against vocabulary]({figures['vocabulary_runs']})",
        _list_runs(runs),
        _tell_choice(vocabularies, runs),
        "Bars mark where a word is cut:",
        cuts,
    )
    return "\n\n".join(parts)


def _tell_bands(results: Results, small: str, large: str) -> str:
    """Where fragmentation falls, from frequent words to unseen ones."""
    table = results.table("tokenizer/bands.csv", ["name", "band", "tokens_per_word"])
    bands = table["band"].unique().tolist()
    values = table.pivot(index="band", columns="name", values="tokens_per_word").loc[bands]
    falls = [f"{values[small][band]:.2f} to {values[large][band]:.2f} ({band})" for band in (bands[0], bands[-1])]
    return (
        f"By how often a word occurs in the training text: from {small} to {large} the tokens per word go from "
        f"{' and from '.join(falls)}."
    )


def _tell_runs(results: Results, runs: pd.DataFrame) -> str:
    """The setting of the small models, and its limits."""
    last = runs[runs["budget"] == runs["budget"].max()]
    own = last[last["own"]]
    budgets = " and of ".join(f"{budget:.3g}" for budget in runs["budget"].unique())
    held_out, rare = (number(results.value(f"tokenizer.runs_{part}_bytes")) for part in ("eval", "rare"))
    small, large = own.iloc[0], own.iloc[-1]
    read = [f"{number(row['bytes'] / 1e6)} MB with {row['name']}" for row in (small, large)]
    learned = large["rare_bits_per_byte"] < large["rare_even_bits_per_byte"]
    gain = "" if learned else ", so what the larger one gains there is the vocabulary's and not the model's"
    return (
        f"Small models were trained with each vocabulary on budgets of {budgets} training FLOPs, "
        f"{number(runs['seeds'].iloc[0])} seeds each, and judged by their bits per byte of {held_out} bytes of "
        f"held-out documents, {rare} of them in rare words. Equal computation is not equal text: at the largest "
        f"budget a run reads {' and '.join(read)}, with the same learning rate and tokens of a step. And a vocabulary "
        "brings along what it has seen: it was trained on all of the training text, rare words included. Guessing all "
        f"tokens alike, without a model, costs {number(large['rare_even_bits_per_byte'])} bits per byte of rare words "
        f"with {large['name']} (trained: {number(large['rare_bits_per_byte'])}) and "
        f"{number(small['rare_even_bits_per_byte'])} with {small['name']} (trained: "
        f"{number(small['rare_bits_per_byte'])}){gain}."
    )


def _list_runs(runs: pd.DataFrame) -> str:
    def spread(row: pd.Series, key: str) -> str:
        return f"{number(row[key])} ({number(row[f'{key}_low'])} to {number(row[f'{key}_high'])})"

    cells = [
        (
            f"{row['budget']:.3g}",
            row["name"],
            number(int(row["steps"])),
            number(row["bytes"] / 1e6),
            spread(row, "bits_per_byte"),
            spread(row, "rare_bits_per_byte"),
        )
        for _, row in runs.iterrows()
    ]
    header = ("FLOPs", "Vocabulary", "Steps", "MB of text", "Bits per byte (lowest to highest seed)", "of rare words")
    return table(header, cells, "rlrrrr")


def _tell_choice(vocabularies: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What follows for GPT-2's 50,257 tokens, as measured."""
    gpt2 = vocabularies[~vocabularies["own"]].iloc[0]
    own = vocabularies[vocabularies["own"]]
    best = best_by_budget(runs)
    if best.empty:
        return "Nothing follows for GPT-2's choice of 50,257: every run diverged."
    last, theirs = best.iloc[-1], runs[(runs["budget"] == runs["budget"].max()) & ~runs["own"]].iloc[0]
    reached = runs[(runs["budget"] == runs["budget"].max()) & runs["own"]]["bits_per_byte"]
    nearest = own.iloc[(own["vocab_size"] - gpt2["vocab_size"]).abs().argmin()]
    size = number(int(last["vocab_size"]))
    smaller = last["vocab_size"] < gpt2["vocab_size"]
    first, ratio = number(int(best.iloc[0]["vocab_size"])), REFERENCE_FLOPS / last["budget"]
    trend = f"The best size is {size} at every budget"
    if first != size:
        trend = f"The best size is {first} at the smallest budget and {size} at the largest"
    limit = f"; the reference run spends {number(float(f'{ratio:.1g}'))} times as much, which was not measured."
    return (
        f"What follows for GPT-2's choice of {number(int(gpt2['vocab_size']))}: on this corpus its tokens hold "
        f"{number(gpt2['bytes_per_token'])} bytes where {nearest['name']}, learned here, has "
        f"{number(nearest['bytes_per_token'])}, and the matrix that embeds them is "
        f"{gpt2['embedding_params_percent']:.0f} % of a model of this scale. At the largest budget it gives "
        f"{number(theirs['bits_per_byte'])} bits per byte, those learned here {number(reached.min())} ({last['name']}) "
        f"to {number(reached.max())}: {'smaller' if smaller else 'no smaller'} is better here. {trend}{limit}"
    )


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
