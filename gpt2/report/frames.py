"""Curves of the studies with derived columns, as sections and figures use them, and statistics of the replicates."""

import math

import pandas as pd

from gpt2.report.markdown import number
from gpt2.report.names import GPT2_VOCABULARY, HEADLINES, WORD_GROUPS
from gpt2.report.results import MODELS, Results
from gpt2.report.verdicts import mean_interval


def load_vocabularies(results: Results) -> pd.DataFrame:
    """The vocabularies of the tokenizer study, smallest first; `own` is False for GPT-2's."""
    columns = [
        "name",
        "vocab_size",
        "bytes_per_token",
        "flops_per_byte",
        *(f"{g}_tokens_per_word" for g in WORD_GROUPS),
    ]
    table = results.table("tokenizer/vocabularies.csv", columns).sort_values("vocab_size", ignore_index=True)
    return table.assign(own=table["name"] != GPT2_VOCABULARY, mflops_per_byte=table["flops_per_byte"] / 1e6)


def load_vocabulary_runs(results: Results) -> pd.DataFrame:
    """The small models of the tokenizer study, a row per budget and vocabulary, smallest first.

    `own` is False for GPT-2's vocabulary. Bits per byte are NaN where a run diverged.
    """
    bits = [f"{part}bits_per_byte{end}" for part in ("", "rare_") for end in ("", "_low", "_high")]
    even = ["even_bits_per_byte", "rare_even_bits_per_byte"]
    columns = ["budget", "name", "vocab_size", "seeds", "steps", "bytes", *bits, *even]
    table = results.table("tokenizer/runs_table.csv", columns).sort_values(["budget", "vocab_size"], ignore_index=True)
    return table.assign(own=table["name"] != GPT2_VOCABULARY)


def load_models(results: Results) -> pd.DataFrame:
    """The HEADLINES of the main model, in the first row, and of its replicates: a column per metric."""
    return results.table(MODELS, [*HEADLINES])[[*HEADLINES]]


def write_spread(values: pd.Series, unit: str = "", sign: str = "") -> str:
    """Mean ± standard deviation (n), rounded to two digits of the deviation: 4.209 ± 0.035 (5); – for one value.

    With the sign "+" a positive mean has one too; the unit is written before the number of values.
    """
    mean, deviation, count = values.mean(), values.std(), values.count()
    if count < 2:
        return "–"
    if deviation == 0:
        return f"{mean:{sign},.6g} ± 0{unit} ({count})"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:{sign},.{decimals}f} ± {deviation:,.{decimals}f}{unit} ({count})"


def write_interval(values: pd.Series) -> str:
    """The 95 % t interval of the mean; – for one value."""
    return "–" if values.count() < 2 else " to ".join(map(number, mean_interval(values.dropna().tolist())))
