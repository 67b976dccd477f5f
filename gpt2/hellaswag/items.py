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
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import tiktoken
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, NonNegativeInt

from gpt2.pipeline.files import UserError, atomic_path
from gpt2.pipeline.params import Config, build

ITEMS = Path("data/hellaswag.jsonl")
ENDINGS = 4
# Fields of Benchmark with an entry for each item.
ITEM_ARRAYS = ("labels", "documents", "in_training")


def _refuse_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


Text = Annotated[str, AfterValidator(_refuse_blank)]


class HellaswagItem(Config):
    """An item in HellaSwag's own form, without other fields; `source_id` (video or article) may be absent."""

    model_config = ConfigDict(extra="ignore")

    ind: NonNegativeInt
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: Text
    endings: list[Text] = Field(min_length=ENDINGS, max_length=ENDINGS)
    label: int = Field(ge=0, lt=ENDINGS)
    source_id: Annotated[str, BeforeValidator(lambda value: value or "")] = ""


@dataclass(frozen=True)
class TokenizedItems:
    """Four rows an item, one an ending, each context and ending in one: row r is tokens[offsets[r] : offsets[r + 1]].

    tokens (sum,) uint16, offsets (4 N + 1,), ending_tokens and ending_chars (4 N,): lengths of the endings.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ending_tokens: np.ndarray
    ending_chars: np.ndarray

    def first(self, n: int) -> "TokenizedItems":
        """The rows of the first `n` items."""
        end, bounds = ENDINGS * n, self.offsets[: ENDINGS * n + 1]
        return TokenizedItems(self.tokens[: bounds[-1]], bounds, self.ending_tokens[:end], self.ending_chars[:end])


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
        protocols = {name: rows.first(min(n, len(self.labels))) for name, rows in self.protocols.items()}
        return Benchmark(self.labels[:n], protocols, self.documents[:n], self.in_training[:n])


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
                yield check_item(json.loads(line), f"{path}:{number}")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; benchmark.path must name a HellaSwag JSONL file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number}: not UTF-8 JSON lines ({error}); get the file again") from error


def check_item(item: object, place: str) -> dict:
    """The fields of `HellaswagItem` in order, source_id if there is one. Raises UserError naming place, field, rule."""
    remedy = "; correct the item, or get the file again"
    return build(HellaswagItem, item, place, remedy).model_dump(exclude_defaults=True)
