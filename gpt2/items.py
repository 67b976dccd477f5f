"""HellaSwag items (Zellers et al. 2019) as text and as tokens, under the two protocols that people quote.

completion: raw context, " " + ending encoded apart from it (Karpathy's build-nanogpt).
harness: "activity: context" with WikiHow markers cleaned, encoded whole and cut at the context's length
(EleutherAI's lm-evaluation-harness, task hellaswag, zero shots).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from gpt2.files import UserError, atomic_path

ENDINGS = 4


@dataclass(frozen=True)
class TokenizedItems:
    """Four rows an item, one an ending, each context and ending in one: row r is tokens[offsets[r] : offsets[r + 1]].

    tokens (sum,) uint16, offsets (4 N + 1,), ending_tokens and ending_chars (4 N,): lengths of the endings.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ending_tokens: np.ndarray
    ending_chars: np.ndarray


@dataclass(frozen=True)
class Benchmark:
    """The items of one benchmark file: labels (N,) and their rows under each protocol."""

    labels: np.ndarray
    protocols: dict[str, TokenizedItems]

    def first(self, n: int) -> "Benchmark":
        """The first `n` items, or all if there are fewer."""
        n = min(n, len(self.labels))
        return Benchmark(self.labels[:n], {name: _first_rows(rows, n) for name, rows in self.protocols.items()})


def _first_rows(rows: TokenizedItems, n: int) -> TokenizedItems:
    end = ENDINGS * n
    return TokenizedItems(
        rows.tokens[: rows.offsets[end]], rows.offsets[: end + 1], rows.ending_tokens[:end], rows.ending_chars[:end]
    )


def _completion(item: dict, ending: str, encoding: tiktoken.Encoding) -> tuple[list[int], int, int]:
    """Tokens of the row, tokens of its ending, characters of its ending."""
    ending_ids = encoding.encode_ordinary(" " + ending)
    return encoding.encode_ordinary(item["ctx"]) + ending_ids, len(ending_ids), len(ending)


def _harness(item: dict, ending: str, encoding: tiktoken.Encoding) -> tuple[list[int], int, int]:
    context = _clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    ending = _clean(ending)
    ids = encoding.encode_ordinary(f"{context} {ending}")
    # The harness moves trailing spaces of a context into the continuation; cleaning has stripped them.
    return ids, len(ids) - len(encoding.encode_ordinary(context)), len(ending)


def _clean(text: str) -> str:
    """The harness's cleaning of WikiHow artefacts."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


PROTOCOLS: dict[str, Callable] = {"completion": _completion, "harness": _harness}


def tokenize_items(items: Sequence[dict], encoding: tiktoken.Encoding) -> Benchmark:
    """Encode items (ctx, ctx_a, ctx_b, activity_label, endings, label) under every protocol."""
    protocols = {}
    for name, render in PROTOCOLS.items():
        rows = [render(item, ending, encoding) for item in items for ending in item["endings"]]
        protocols[name] = TokenizedItems(
            np.concatenate([np.array(ids, dtype=np.uint16) for ids, _, _ in rows]),
            np.cumsum([0] + [len(ids) for ids, _, _ in rows]),
            np.array([n_tokens for _, n_tokens, _ in rows]),
            np.array([n_chars for _, _, n_chars in rows]),
        )
    return Benchmark(np.array([item["label"] for item in items]), protocols)


def save_benchmark(benchmark: Benchmark, path: Path) -> None:
    """Write all arrays to one .npz, whose bytes depend on the items alone."""
    arrays = {"labels": benchmark.labels}
    for name, rows in benchmark.protocols.items():
        arrays |= {f"{name}_{field}": array for field, array in vars(rows).items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)


def load_benchmark(path: Path) -> Benchmark:
    """Read what `save_benchmark` wrote. Raises UserError if it is absent or damaged."""
    fields = TokenizedItems.__dataclass_fields__
    try:
        with np.load(path, allow_pickle=False) as arrays:
            protocols = {name: TokenizedItems(*(arrays[f"{name}_{field}"] for field in fields)) for name in PROTOCOLS}
            return Benchmark(arrays["labels"], protocols)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `dvc repro -f tokenize`") from error


def read_items(path: Path) -> list[dict]:
    """Read items from JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
