"""Small models trained with each vocabulary on equal computation, and judged in bits per byte of held-out text.

Equal computation: every run takes as many steps as its budget of FLOPs pays for (`training_flops_per_token`, embedding
and output layer included), so a larger vocabulary means fewer, dearer tokens. Bits per byte is the one unit in which
vocabularies can be compared: a loss per token is of more text the larger the vocabulary.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
import tiktoken
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from gpt2.model.config import GPTConfig, ModelShape
from gpt2.model.dist import Precision
from gpt2.model.evaluate import window_losses
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.tokenizer.encodings import PATTERN
from gpt2.tokenizer_study.study import count_bytes
from gpt2.tokenizer_study.words import GROUPS
from gpt2.train.optim import AdamConfig, OptimConfig
from gpt2.train.short_runs import order_windows, run_each, train_windows

# What is judged: all of the text, and the words of each group by themselves.
PARTS = ("", *(f"{group}_" for group in GROUPS))
VOCABULARY_RUN_COLUMNS = (
    *("budget", "name", "vocab_size", "seed", "steps", "tokens", "bytes", "epochs", "flops"),
    *("train_loss", "diverged", *(f"{part}{key}" for part in PARTS for key in ("bits_per_byte", "even_bits_per_byte"))),
)
VOCABULARY_TABLE_COLUMNS = (
    *("budget", "name", "vocab_size", "seeds", "steps", "tokens", "bytes", "diverged"),
    *(f"{part}bits_per_byte{end}" for part in PARTS for end in ("", "_low", "_high")),
    *(f"{part}even_bits_per_byte" for part in PARTS),
)
# A schedule of fewer steps is no training.
MIN_STEPS = 5
# The training loss of a run is the mean over its last steps.
LAST_STEPS = 10


class VocabularyRunsConfig(ModelShape, AdamConfig):
    """Section `vocabulary_runs`: its own, small model and optimizer, the same for every vocabulary."""

    # Training FLOPs of one run; every vocabulary is trained with each budget and seed.
    budgets: tuple[PositiveFloat, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    max_lr: PositiveFloat
    # The final learning rate as a fraction of the largest, and the warm-up as a fraction of the steps.
    min_lr_fraction: float = Field(ge=0, le=1)
    warmup_fraction: float = Field(ge=0, lt=1)
    # Windows of one step, and at most of one forward pass.
    batch_windows: PositiveInt
    micro_batch: PositiveInt
    precision: Precision
    # About so many bytes of the training text, and of the held-out text: every n-th document.
    text_bytes: PositiveInt
    eval_bytes: PositiveInt

    @model_validator(mode="after")
    def _each_once(self) -> "VocabularyRunsConfig":
        for name in ("budgets", "seeds"):
            values = getattr(self, name)
            if sorted(set(values)) != list(values):
                raise ValueError(f"{name}={list(values)} must be increasing, without repeats; sort the list")
        return self


@dataclass(frozen=True)
class VocabularySetting:
    """One run."""

    budget: float
    name: str
    seed: int


@dataclass(frozen=True)
class RunText:
    """The text of the runs as one vocabulary sees it.

    windows (N, T + 1) of training ids; stream (M + 1,) of held-out ids, every document between end-of-text tokens;
    marks (M,) for each part of the held-out text which targets belong to it, and its bytes.
    """

    vocab_size: int
    bytes_per_token: float
    windows: Tensor
    stream: Tensor
    marks: dict[str, Tensor]
    sizes: dict[str, int]


def thin(texts: Sequence[str], max_bytes: int) -> list[str]:
    """Every n-th text, with the smallest n that leaves about `max_bytes` of UTF-8."""
    return list(texts[:: -(-count_bytes(texts) // max_bytes)])


def encode_runs(
    training: Sequence[str],
    held_out: Sequence[str],
    groups: Mapping[str, Mapping[str, int]],
    encoding: tiktoken.Encoding,
    block_size: int,
) -> RunText:
    """The texts in one vocabulary. `groups` are the words whose tokens are judged apart.

    Raises UserError if the training text does not fill a window or a group does not occur in the held-out text.
    """
    separator = np.array([encoding.eot_token], dtype=np.uint32)
    documents = [(separator, encoding.encode_to_numpy(text, disallowed_special=())) for text in training]
    ids = torch.from_numpy(np.concatenate([part for document in documents for part in document]).astype(np.int32))
    if len(ids) <= block_size:
        raise UserError(f"vocabulary_runs.text_bytes leaves {len(ids)} tokens, less than a window; raise it")
    stream, owners, sizes = [encoding.eot_token], [], [0] * len(PARTS)
    for text in held_out:
        for piece in regex.findall(PATTERN, text):
            # No token spans two pieces, so the tokens of a word are its own.
            tokens = encoding.encode_ordinary(piece)
            held_by = [True, *(piece in groups[group] for group in GROUPS)]
            stream += tokens
            owners += [held_by] * len(tokens)
            sizes = [size + len(piece.encode("utf-8")) * held for size, held in zip(sizes, held_by, strict=True)]
        # The end of a document must be predicted as well.
        stream.append(encoding.eot_token)
        owners.append([True, *(False for _ in GROUPS)])
    if absent := [group for group, size in zip(GROUPS, sizes[1:], strict=True) if not size]:
        raise UserError(f"vocabulary_runs.eval_bytes leaves no {', '.join(absent)} word; raise it")
    marks = torch.tensor(owners).t()
    return RunText(
        encoding.n_vocab,
        count_bytes(training) / len(ids),
        ids.unfold(0, block_size + 1, block_size),
        torch.tensor(stream),
        dict(zip(PARTS, marks, strict=True)),
        dict(zip(PARTS, sizes, strict=True)),
    )


def stream_losses(model: GPT, stream: Tensor, batch_size: int, precision: Precision) -> Tensor:
    """Loss in nats of each token of `stream` (M + 1,) but the first, (M,) fp32.

    Windows overlap by half, so that every token but those of the first window is predicted from half a context or more:
    else a vocabulary with more tokens to the text would start from nothing more often.
    """
    T = model.config.block_size
    stride, n_targets = -(-T // 2), len(stream) - 1
    count = 1 + max(0, -(-(n_targets - T) // stride))
    padded = torch.nn.functional.pad(stream, (0, (count - 1) * stride + T - n_targets))
    losses = window_losses(model, padded.unfold(0, T + 1, stride), batch_size, precision)
    return torch.cat([losses[0, : T - stride], losses[:, T - stride :].flatten()])[:n_targets]


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
) -> dict[str, Any]:
    """Train one model from its seed as long as its budget lasts; its row, as in VOCABULARY_RUN_COLUMNS.

    Bits per byte are infinite if the run diverged; the `even` ones are of guessing all tokens alike. Raises UserError
    if the budget pays for less than MIN_STEPS.
    """
    values = config.model_dump()
    shape = {key: values[key] for key in ModelShape.model_fields}
    steps, step_flops = count_steps(setting.budget, config, text.vocab_size)
    tokens_per_step = config.batch_windows * config.block_size
    schedule = OptimConfig(
        **{key: values[key] for key in AdamConfig.model_fields},
        max_steps=steps,
        max_lr=config.max_lr,
        min_lr=config.max_lr * config.min_lr_fraction,
        warmup_steps=int(config.warmup_fraction * steps),
    )
    model = GPT(GPTConfig(**shape, vocab_size=text.vocab_size, norm="preln"), setting.seed).to(device)
    order = order_windows(len(text.windows), steps, config.batch_windows, setting.seed)
    curve = train_windows(model, schedule, text.windows.long(), order, config.micro_batch, config.precision)
    losses = stream_losses(model, text.stream, config.micro_batch, config.precision).double()
    diverged = curve.diverged_at_step >= 0 or not bool(losses.isfinite().all())
    row: dict[str, Any] = {
        "budget": setting.budget,
        "name": setting.name,
        "vocab_size": text.vocab_size,
        "seed": setting.seed,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "bytes": round(steps * tokens_per_step * text.bytes_per_token),
        "epochs": steps * config.batch_windows / len(text.windows),
        "flops": steps * step_flops,
        "train_loss": float(np.mean(curve.losses[-LAST_STEPS:])) if curve.losses else math.inf,
        "diverged": int(diverged),
    }
    for part, mark in text.marks.items():
        bits = math.inf if diverged else losses[mark].sum().item() / math.log(2) / text.sizes[part]
        row[f"{part}bits_per_byte"] = bits
        # Guessing all tokens alike: what a vocabulary achieves without a model.
        row[f"{part}even_bits_per_byte"] = int(mark.sum()) * math.log2(text.vocab_size) / text.sizes[part]
    return row


def run_vocabularies(
    config: VocabularyRunsConfig, texts: Mapping[str, RunText], hardware: HardwareConfig
) -> list[dict[str, Any]]:
    """All runs, a row each as in VOCABULARY_RUN_COLUMNS: by budget, then in the order of `texts`, then by seed."""
    settings = [VocabularySetting(*values) for values in itertools.product(config.budgets, texts, config.seeds)]
    # The longest first, so that no worker is left with one at the end.
    tasks = [(setting, config, texts[setting.name]) for setting in reversed(settings)]
    return run_each(train_vocabulary_run, tasks, hardware)[::-1]


def vocabulary_table_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per budget and vocabulary with VOCABULARY_TABLE_COLUMNS: mean, lowest and highest over seeds."""
    rows = []
    for _, group in itertools.groupby(runs, key=lambda run: (run["budget"], run["name"])):
        same = list(group)
        row = {column: same[0][column] for column in ("budget", "name", "vocab_size")}
        row |= {"seeds": len(same), **{column: same[0][column] for column in ("steps", "tokens", "bytes")}}
        row["diverged"] = sum(run["diverged"] for run in same)
        for part in PARTS:
            values = [run[f"{part}bits_per_byte"] for run in same]
            key = f"{part}bits_per_byte"
            row |= {key: sum(values) / len(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        rows.append(row | {f"{part}even_bits_per_byte": same[0][f"{part}even_bits_per_byte"] for part in PARTS})
    return rows


def vocabulary_run_figures(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, RunText]) -> dict[str, Any]:
    """Entries of metrics/tokenizer.json from the rows of the table: those of the largest budget by vocabulary, and the
    best vocabulary of each budget. A vocabulary of which a run diverged has no bits per byte."""
    largest = rows[-1]["budget"]
    any_text = next(iter(texts.values()))
    figures: dict[str, Any] = {
        "runs_eval_bytes": any_text.sizes[""],
        **{f"runs_{part}bytes": any_text.sizes[part] for part in PARTS if part},
        "runs_seeds": rows[0]["seeds"],
    }
    for row in rows:
        if row["budget"] == largest and not row["diverged"]:
            keys = (f"{part}{key}" for part in PARTS for key in ("bits_per_byte", "even_bits_per_byte"))
            figures |= {f"{row['name']}_{key}": row[key] for key in keys}
    for number, (budget, group) in enumerate(itertools.groupby(rows, key=lambda row: row["budget"]), start=1):
        best = min(group, key=lambda row: row["bits_per_byte"])
        figures |= {f"budget_{number}_flops": budget, f"budget_{number}_best_vocab_size": best["vocab_size"]}
    return figures
