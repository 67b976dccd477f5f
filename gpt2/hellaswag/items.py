"""HellaSwag items (Zellers et al. 2019) as text and as tokens, under the two protocols that people quote.

completion: raw context, " " + ending encoded apart from it (Karpathy's build-nanogpt).
harness: "activity: context" with WikiHow markers cleaned, encoded whole and cut at the context's length
(EleutherAI's lm-evaluation-harness, task hellaswag, zero shots).
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import tiktoken

from gpt2.pipeline.files import UserError, atomic_path

ITEMS = Path("data/hellaswag.jsonl")
ENDINGS = 4
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
# Fields of Benchmark with an entry for each item.
ITEM_ARRAYS = ("labels", "documents", "in_training")


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
    """The items of one benchmark file: labels (N,) and their rows under each protocol.

    documents (N,) int: the number of the document that an item was made from, by default a document for each item.
    in_training (N,) bool: whether the answer occurs in the training documents, by default nowhere.
    """

    labels: np.ndarray
    protocols: dict[str, TokenizedItems]
    documents: np.ndarray = None  # type: ignore[assignment]  # set below
    in_training: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.documents is None:
            object.__setattr__(self, "documents", np.arange(len(self.labels)))
        if self.in_training is None:
            object.__setattr__(self, "in_training", np.zeros(len(self.labels), dtype=bool))

    def first(self, n: int) -> "Benchmark":
        """The first `n` items, or all if there are fewer."""
        n = min(n, len(self.labels))
        protocols = {name: _first_rows(rows, n) for name, rows in self.protocols.items()}
        return Benchmark(self.labels[:n], protocols, self.documents[:n], self.in_training[:n])


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
    # Cleaning may leave spaces at the end of a context; the harness counts them to the continuation.
    return ids, len(ids) - len(encoding.encode_ordinary(context.rstrip())), len(ending)


def _clean(text: str) -> str:
    """The harness's cleaning of WikiHow artefacts."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


PROTOCOLS: dict[str, Callable] = {"completion": _completion, "harness": _harness}
ACCURACIES = tuple(f"{protocol}_{kind}" for protocol in PROTOCOLS for kind in ("acc", "acc_norm"))


def tokenize_items(items: Sequence[dict], encoding: tiktoken.Encoding) -> Benchmark:
    """Encode items (ctx, ctx_a, ctx_b, activity_label, endings, label) under every protocol.

    Items with the same `source_id` are of one document; an item without is of a document of its own.
    """
    protocols = {}
    for name, render in PROTOCOLS.items():
        rows = [render(item, ending, encoding) for item in items for ending in item["endings"]]
        protocols[name] = TokenizedItems(
            np.concatenate([np.array(ids, dtype=np.uint16) for ids, _, _ in rows]),
            np.cumsum([0] + [len(ids) for ids, _, _ in rows]),
            np.array([n_tokens for _, n_tokens, _ in rows]),
            np.array([n_chars for _, _, n_chars in rows]),
        )
    numbers: dict[str | int, int] = {}
    documents = [numbers.setdefault(item.get("source_id", i), len(numbers)) for i, item in enumerate(items)]
    return Benchmark(np.array([item["label"] for item in items]), protocols, np.array(documents))


def save_benchmark(benchmark: Benchmark, path: Path) -> None:
    """Write all arrays to one .npz, whose bytes depend on the items alone."""
    arrays = {name: getattr(benchmark, name) for name in ITEM_ARRAYS}
    for name, rows in benchmark.protocols.items():
        arrays |= {f"{name}_{field}": array for field, array in vars(rows).items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]  # no name is that of its flag


def load_benchmark(path: Path) -> Benchmark:
    """Read what `save_benchmark` wrote. Raises UserError if it is absent or damaged."""
    fields = TokenizedItems.__dataclass_fields__
    try:
        with np.load(path, allow_pickle=False) as arrays:
            protocols = {name: TokenizedItems(*(arrays[f"{name}_{field}"] for field in fields)) for name in PROTOCOLS}
            return Benchmark(protocols=protocols, **{name: arrays[name] for name in ITEM_ARRAYS})
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); run `dvc repro -f tokenize`") from error


def read_items(path: Path) -> Iterator[dict]:
    """Yield validated items of a JSONL or gzipped JSONL file. Raises UserError naming file, line and rule."""
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield check_item(json.loads(line), f"{path}, line {number}")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; benchmark.path must name a HellaSwag JSONL file") from error
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, line {number}: not UTF-8 JSON lines ({error}); fetch the file again") from error


def check_item(item: object, place: str) -> dict:
    """The fields of a HellaSwag item, in order, without any others; `source_id` (video or article) may be absent.

    Raises UserError naming place and rule.
    """
    if not isinstance(item, dict):
        raise UserError(f"{place}: a line must hold a JSON object, not {type(item).__name__}")
    if missing := [field for field in ("ind", *TEXT_FIELDS, "endings", "label") if field not in item]:
        raise UserError(f"{place} lacks {', '.join(missing)}; a HellaSwag item has them")
    for field in TEXT_FIELDS:
        if not isinstance(item[field], str):
            raise UserError(f"{place}: {field} = {item[field]!r} must be a string")
    if not item["ctx"].strip():
        raise UserError(f"{place}: ctx must not be empty")
    endings = item["endings"]
    if not isinstance(endings, list) or not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise UserError(f"{place}: endings = {endings!r} must be a list of strings that are not empty")
    if len(endings) != ENDINGS:
        raise UserError(f"{place}: endings has {len(endings)} entries; a HellaSwag item has {ENDINGS}")
    for field, limit in (("ind", None), ("label", ENDINGS)):
        value = item[field]
        if type(value) is not int or value < 0 or (limit is not None and value >= limit):
            rule = f"a whole number from 0 to {limit - 1}" if limit else "a whole number from 0"
            raise UserError(f"{place}: {field} = {value!r} must be {rule}")
    fields = ["ind", *TEXT_FIELDS, "endings", "label"]
    if source := item.get("source_id"):
        if not isinstance(source, str):
            raise UserError(f"{place}: source_id = {source!r} must be a string, or absent")
        fields.append("source_id")
    return {field: item[field] for field in fields}
