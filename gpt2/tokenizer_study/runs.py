"""Small models trained with each vocabulary on equal computation, and judged in bits per byte of held-out text.

Equal computation: every run takes as many steps as its budget of FLOPs pays for (`training_flops_per_token`, embedding
and output layer included), so a larger vocabulary means fewer, more expensive tokens. Bits per byte is the one unit in
which vocabularies can be compared: a token is more text the larger the vocabulary.

Every vocabulary gets the learning rate of `max_lrs` that has the fewest bits per byte of the validation split at that
budget, as a mean over the first `search_seeds` seeds. Only this rate is run with the other seeds, and only its bits per
byte of the test split enter the table.

Runs are paired by seed: with the same seed, the n-th training window of every run begins at the same place of the same
document, whatever the vocabulary, rate and budget; runs differ in how many windows they read and how much text one
holds. The initial weights are not paired: the random numbers of a seed go to the embedding first, whose size differs.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import tiktoken
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from scipy import stats
from torch import Tensor

from gpt2.data.order import sample_windows
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.tokenizer.encodings import GPT2
from gpt2.tokenizer_study.held_out import HeldOut, encode_held_out, score_even, score_held_out
from gpt2.tokenizer_study.study import count_bytes
from gpt2.tokenizer_study.words import GROUPS
from gpt2.train.short_runs import ShortRunConfig, run_each, train_windows

# What is judged: all of the text, and the words of each group.
PARTS = ("", *(f"{group}_" for group in GROUPS))
EVEN = tuple(f"{part}even_bits_per_byte" for part in PARTS)
# Over documents; and whether the bits are below guessing all tokens alike, by the interval of the difference.
RARE_INTERVAL = ("rare_bits_per_byte_ci_low", "rare_bits_per_byte_ci_high", "rare_below_even")
# A schedule of fewer steps is no training.
MIN_STEPS = 5
# The training loss of a run is the mean over its last steps.
LAST_STEPS = 10
CONFIDENCE = 0.95
FIT_SIZES = 2


class VocabularyRunsConfig(ShortRunConfig):
    """Section `vocabulary_runs`: model and optimizer are the same for every vocabulary."""

    # Training FLOPs of one run; every vocabulary is trained with each budget and seed.
    budgets: tuple[PositiveFloat, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    # Learning rates to choose from, for each budget and vocabulary, by the first `search_seeds` seeds.
    max_lrs: tuple[PositiveFloat, ...] = Field(min_length=1)
    search_seeds: PositiveInt
    # The warm-up as a fraction of the steps.
    warmup_fraction: float = Field(ge=0, lt=1)
    # Approximate bytes of the training text, and of each of the validation and the test text: every n-th document.
    text_bytes: PositiveInt
    eval_bytes: PositiveInt

    @model_validator(mode="after")
    def _lists_fit(self) -> "VocabularyRunsConfig":
        for name in ("budgets", "seeds", "max_lrs"):
            values = getattr(self, name)
            if sorted(set(values)) != list(values):
                raise ValueError(f"{name}={list(values)} must be increasing, without repeats; sort the list")
        if self.search_seeds > len(self.seeds):
            raise ValueError(f"search_seeds={self.search_seeds} must be at most the {len(self.seeds)} seeds; lower it")
        return self


@dataclass(frozen=True)
class VocabularySetting:
    """One run."""

    budget: float
    name: str
    max_lr: float
    seed: int


@dataclass(frozen=True)
class RunText:
    """The texts of the runs in one vocabulary.

    ids (N,): training tokens, an end-of-text token before each document. byte_starts, token_starts (documents + 1,):
    where a document begins in the training text, the end of the text included.
    """

    vocab_size: int
    ids: np.ndarray
    byte_starts: np.ndarray
    token_starts: np.ndarray
    validation: HeldOut
    test: HeldOut


@dataclass(frozen=True)
class VocabularyRun:
    """A row of runs.csv; `bits`, `even` bits and `bytes` of the rare words of each test document that holds one."""

    row: dict[str, Any]
    rare: pd.DataFrame


def thin(texts: Sequence[str], max_bytes: int) -> list[str]:
    """Every n-th text, with the smallest n that leaves about `max_bytes` of UTF-8."""
    return list(texts[:: -(-count_bytes(texts) // max_bytes)])


def encode_runs(
    splits: tuple[Sequence[str], Sequence[str], Sequence[str]],
    groups: Mapping[str, Mapping[str, int]],
    encoding: tiktoken.Encoding,
    config: VocabularyRunsConfig,
) -> RunText:
    """Training, validation and test documents in one vocabulary. `groups` are the words that are judged separately.

    Raises UserError if the training text does not fill a window, or a group does not occur in the test text.
    """
    training, validation, test = splits
    documents = [[encoding.eot_token, *encoding.encode_ordinary(text)] for text in training]
    ids = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32)
    if len(ids) <= config.block_size:
        raise UserError(f"vocabulary_runs.text_bytes leaves {len(ids)} tokens, less than a window; raise it")
    judged = encode_held_out(test, groups, encoding)
    if absent := [group for group in groups if not judged.words[group].any()]:
        raise UserError(f"vocabulary_runs.eval_bytes leaves no {', '.join(absent)} word; raise it")
    return RunText(
        encoding.n_vocab,
        ids,
        np.cumsum([0, *(len(text.encode("utf-8")) for text in training)]),
        np.cumsum([0, *map(len, documents)]),
        encode_held_out(validation, {}, encoding),
        judged,
    )


def paired_windows(text: RunText, count: int, block_size: int, seed: int) -> Tensor:
    """The first `count` training windows of a seed, (count, T + 1) int64.

    They begin at random bytes of the text, which depend on the seed and the number of bytes alone. The token at a byte
    is interpolated within its document.
    """
    places = sample_windows(np.arange(count), int(text.byte_starts[-1]), seed)
    starts = np.interp(places, text.byte_starts, text.token_starts).astype(np.int64)
    starts = starts.clip(max=len(text.ids) - block_size - 1)
    return torch.from_numpy(text.ids[starts[:, None] + np.arange(block_size + 1)]).long()


def count_steps(budget: float, config: VocabularyRunsConfig, vocab_size: int) -> tuple[int, int]:
    """Steps that a budget pays for, and the FLOPs of one. Raises UserError if these are less than MIN_STEPS."""
    flops = training_flops_per_token(config, vocab_size) * config.batch_windows * config.block_size
    steps = round(budget / flops)
    if steps < MIN_STEPS:
        raise UserError(
            f"vocabulary_runs.budgets={budget:g} pays for {steps} steps with a vocabulary of {vocab_size}, each of "
            f"{flops:.3g} FLOPs; raise it to {MIN_STEPS * flops:.3g} or more, or lower vocabulary_runs.batch_windows"
        )
    return steps, flops


def train_vocabulary_run(
    setting: VocabularySetting, config: VocabularyRunsConfig, text: RunText, device: torch.device
) -> VocabularyRun:
    """Train one model from its seed as long as its budget lasts, and judge it; `chosen` is 0 in its row.

    Bits per byte are of the test split and infinite if the run diverged; `even` ones are of guessing all tokens alike.
    Raises UserError if the budget pays for less than MIN_STEPS.
    """
    steps, step_flops = count_steps(setting.budget, config, text.vocab_size)
    tokens = steps * config.batch_windows * config.block_size
    schedule = config.schedule(setting.max_lr, max_steps=steps, warmup_steps=int(config.warmup_fraction * steps))
    model = GPT(config.shape(text.vocab_size, "preln"), setting.seed).to(device)
    windows = paired_windows(text, steps * config.batch_windows, config.block_size, setting.seed)
    order = np.arange(len(windows)).reshape(steps, -1)
    curve = train_windows(model, schedule, windows, order, config.micro_batch, config.precision)
    validation, test = (
        score_held_out(model, split, config.micro_batch, config.precision) for split in (text.validation, text.test)
    )
    even = score_even(text.test)
    judged = {f"{part}bits_per_byte": bits for part, bits in test.bits_per_byte.items()}
    judged["val_bits_per_byte"] = validation.bits_per_byte[""]
    diverged = curve.diverged_at_step >= 0 or not all(map(math.isfinite, judged.values()))
    row = {
        **{"budget": setting.budget, "name": setting.name, "vocab_size": text.vocab_size, "max_lr": setting.max_lr},
        **{"seed": setting.seed, "chosen": 0, "steps": steps, "tokens": tokens},
        "bytes": round(tokens * text.byte_starts[-1] / len(text.ids)),
        "epochs": tokens / len(text.ids),
        "flops": steps * step_flops,
        "train_loss": float(np.mean(curve.losses[-LAST_STEPS:])) if curve.losses else math.inf,
        "diverged": int(diverged),
        **(dict.fromkeys(judged, math.inf) if diverged else judged),
        **dict(zip(EVEN, even.bits_per_byte.values(), strict=True)),
    }
    # NaN would be left out of sums.
    words = test.words.assign(bits=math.inf if diverged else test.words["bits"], even=even.words["bits"])
    rare = words[words["rare"]].groupby("document")[["bits", "even", "bytes"]].sum()
    return VocabularyRun(row, rare)


def run_vocabularies(
    config: VocabularyRunsConfig, texts: Mapping[str, RunText], hardware: HardwareConfig
) -> list[VocabularyRun]:
    """All runs, first those that choose a learning rate: by budget, then in the order of `texts`, by rate and seed."""

    def run(settings: Iterable[VocabularySetting]) -> list[VocabularyRun]:
        # The longest first, so that no worker is left with one at the end.
        ordered = sorted(settings, key=lambda setting: -setting.budget)
        return run_each(train_vocabulary_run, [(s, config, texts[s.name]) for s in ordered], hardware)

    searched, others = config.seeds[: config.search_seeds], config.seeds[config.search_seeds :]
    grid = itertools.product(config.budgets, texts, config.max_lrs, searched)
    runs = run(VocabularySetting(*values) for values in grid)
    chosen = choose_rates([run.row for run in runs])
    settings = itertools.product(chosen.items(), others)
    runs += run(VocabularySetting(budget, name, lr, seed) for ((budget, name), lr), seed in settings)
    names = list(texts)
    for each in runs:
        each.row["chosen"] = int(chosen[each.row["budget"], each.row["name"]] == each.row["max_lr"])
    return sorted(
        runs, key=lambda run: (run.row["budget"], names.index(run.row["name"]), run.row["max_lr"], run.row["seed"])
    )


def choose_rates(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[float, str], float]:
    """Learning rate with the lowest mean `val_bits_per_byte` over seeds for each budget and vocabulary."""
    means = pd.DataFrame(rows).groupby(["budget", "name", "max_lr"])["val_bits_per_byte"].mean()
    return {key[:2]: key[2] for key in means.groupby(level=["budget", "name"], sort=False).idxmin()}


def vocabulary_table(runs: Sequence[VocabularyRun]) -> pd.DataFrame:
    """The rows of runs_table.csv: one per budget and vocabulary, at the chosen learning rate.

    Bits per byte are the mean, the lowest and the highest over seeds. The 95 % interval of the rare words is over
    documents: a bootstrap of their mean bits over seeds. (The words of a document are not independent.)
    `rare_below_even` is 1 if the interval of the difference from guessing all tokens alike is below 0.
    """
    chosen = [run for run in runs if run.row["chosen"]]
    spread = {"": "mean", "_low": "min", "_high": "max"}
    columns = {
        "seeds": ("seed", "size"),
        **{key: (key, "first") for key in ("steps", "tokens", "bytes", *EVEN)},
        **{"diverged": ("diverged", "sum"), "val_bits_per_byte": ("val_bits_per_byte", "mean")},
        **{f"{part}bits_per_byte{end}": (f"{part}bits_per_byte", how) for part in PARTS for end, how in spread.items()},
    }
    keys = ["budget", "name", "vocab_size", "max_lr"]
    rows = pd.DataFrame([run.row for run in chosen])
    table = rows.groupby(keys, sort=False).agg(**columns).reset_index()  # type: ignore[call-overload]
    # The chosen runs are in the order of the table.
    groups = itertools.groupby(chosen, key=lambda run: [run.row[key] for key in keys])
    rare = [pd.concat([run.rare for run in group]).groupby(level=0).mean() for _, group in groups]
    table[list(RARE_INTERVAL[:2])] = [
        bootstrap_ratio(each["bits"].to_numpy(), each["bytes"].to_numpy()) for each in rare
    ]
    differences = [bootstrap_ratio((each["bits"] - each["even"]).to_numpy(), each["bytes"].to_numpy()) for each in rare]
    table["rare_below_even"] = [int(high < 0) for _, high in differences]
    return table


def bootstrap_ratio(bits: np.ndarray, n_bytes: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bits.sum() / n_bytes.sum() over documents (N,); (-inf, inf) from one document."""
    if len(bits) < 2 or not np.isfinite(bits).all():
        return -math.inf, math.inf
    interval = stats.bootstrap(
        (bits, n_bytes),
        lambda bits, n_bytes, axis: bits.sum(axis) / n_bytes.sum(axis),
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def best_log_size(log_sizes: Sequence[float], bits: Sequence[float]) -> float:
    """Minimum, over the given range, of the least-squares parabola of bits per byte in log2 of the vocabulary size.

    Through two points it is a line. An end of the range if the curve has no minimum inside.
    """
    curve = np.polynomial.Polynomial.fit(log_sizes, bits, min(2, len(log_sizes) - 1))
    low, high = log_sizes[0], log_sizes[-1]
    return min([low, high, *(x for x in curve.deriv().roots().real if low < x < high)], key=curve)


def fit_best_size(rows: pd.DataFrame) -> dict[str, int]:
    """The best vocabulary size by `rows` of one budget and of the vocabularies to compare, at their chosen rates.

    A parabola per seed gives an optimum in log2 of the size. It is fitted to the size with the lowest mean and up to
    FIT_SIZES on either side: further away the curve is no parabola. Reported are the mean over seeds and its 95 % t
    interval, clipped to the measured range; the whole range from one seed. `runs_best_at_edge` is 1 if the optimum of a
    seed is an end of the measured range: the best size may then be outside, and the interval is too narrow. A
    vocabulary with a diverged run is left out; no entries if none is left.
    """
    bits = rows.pivot(index="seed", columns="vocab_size", values="bits_per_byte")
    bits = bits.replace(math.inf, math.nan).dropna(axis="columns").sort_index(axis="columns")
    if bits.empty:
        return {}
    log_sizes = list(np.log2(bits.columns.to_numpy(int)))
    lowest = int(bits.mean().argmin())
    near = slice(max(0, lowest - FIT_SIZES), lowest + FIT_SIZES + 1)
    best = np.array([best_log_size(log_sizes[near], list(values[near])) for values in bits.to_numpy()])
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(best) - 1) * stats.sem(best) if len(best) > 1 else math.inf
    low, mean, high = 2 ** np.clip(best.mean() + np.array([-half, 0, half]), log_sizes[0], log_sizes[-1])
    return {
        "runs_best_vocab_size": round(mean),
        "runs_best_vocab_size_low": round(low),
        "runs_best_vocab_size_high": round(high),
        "runs_best_at_edge": int(np.isin(best, [log_sizes[0], log_sizes[-1]]).any()),
    }


def vocabulary_run_figures(
    runs: Sequence[VocabularyRun], table: pd.DataFrame, texts: Mapping[str, RunText]
) -> dict[str, Any]:
    """Entries of metrics/tokenizer.json: the rows of the largest budget by vocabulary, the best vocabulary of each
    budget, and the fitted best size of the largest. A vocabulary with a diverged run has no bits per byte."""
    test = next(iter(texts.values())).test
    figures: dict[str, Any] = {
        "runs_eval_bytes": test.n_bytes,
        **{f"runs_{group}_bytes": int(test.words["bytes"][test.words[group]].sum()) for group in GROUPS},
        "runs_seeds": int(table["seeds"].iloc[0]),
    }
    largest = table["budget"].max()
    for row in table[(table["budget"] == largest) & (table["diverged"] == 0)].to_dict("records"):
        keys = ("max_lr", *(f"{part}bits_per_byte" for part in PARTS), *EVEN, *RARE_INTERVAL)
        figures |= {f"{row['name']}_{key}": row[key] for key in keys if math.isfinite(row[key])}
    best = table.loc[table.groupby("budget")["bits_per_byte"].idxmin()].to_dict("records")
    for number, row in enumerate(best, start=1):
        figures |= {f"budget_{number}_flops": row["budget"], f"budget_{number}_best_vocab_size": row["vocab_size"]}
    rows = pd.DataFrame([run.row for run in runs])
    own = (rows["name"] != GPT2) & (rows["budget"] == largest) & (rows["chosen"] == 1)
    return figures | fit_best_size(rows[own])
