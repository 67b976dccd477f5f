"""The multiple-choice benchmark: HellaSwag itself, or items of its form made from held-out documents."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gpt2.hellaswag.items import ENDINGS, check_item, read_items
from gpt2.pipeline.files import UserError, write_text
from gpt2.pipeline.params import Config
from gpt2.prepare.corpus import read_split
from gpt2.prepare.hub import COMMIT, open_dataset

# HellaSwag's validation split.
WHOLE = 10_042
# Below this the standard error of an accuracy exceeds four points.
MIN_ITEMS = 100
# Passages gathered per item wanted; limits memory with a large corpus.
PASSAGES_PER_ITEM = 4
LONGEST_WORD = 30


class BenchmarkConfig(Config):
    """Section `benchmark`: where items come from. Fields of other sources may be absent."""

    source: Literal["heldout", "file", "hub"]
    # heldout: most items to make. file, hub: how many to take, in order; null takes all.
    items: PositiveInt | None = None
    # heldout: words of a context and of each ending.
    context_words: PositiveInt | None = None
    ending_words: PositiveInt | None = None
    # heldout: most items made from one document; null sets no limit.
    max_per_document: PositiveInt | None = None
    seed: NonNegativeInt = 0
    # file: HellaSwag as JSONL or gzipped JSONL.
    path: Path | None = None
    # hub: a dataset of the Hugging Face hub, a pattern for the names of its Parquet files, and its commit.
    dataset: str = "Rowan/hellaswag"
    files: str = "data/validation-*.parquet"
    revision: str = Field("218ec52e09a7e7462a5400043bb9a69a41d06b76", pattern=rf"^{COMMIT.pattern}$")

    @model_validator(mode="after")
    def _complete(self) -> "BenchmarkConfig":
        needed: dict[str, tuple[str, ...]] = {
            "heldout": ("items", "context_words", "ending_words"),
            "file": ("path",),
            "hub": (),
        }
        if missing := [key for key in needed[self.source] if getattr(self, key) is None]:
            raise ValueError(f"source={self.source} needs {', '.join(missing)}; set them")
        return self


class Passage(NamedTuple):
    """Consecutive words of a document, cut in two; `document` is its number in the test split."""

    document: int
    context: str
    ending: str


def make_items(config: BenchmarkConfig, corpus: Path) -> list[dict[str, Any]]:
    """The items of the chosen source.

    Raises UserError if it cannot be read, breaks HellaSwag's form, holds fewer items than config.items, or is another
    set than HellaSwag's validation split although config.items is the size of that.
    """
    if config.source == "heldout":
        return heldout_items(read_split(corpus, "test"), config)
    if config.source == "file":
        assert config.path is not None  # BenchmarkConfig refuses it
        place, items = str(config.path), list(read_items(config.path))
    else:
        place, items = config.dataset, list(_read_hub(config))
    n = config.items
    if n is not None and (len(items) < n or (n == WHOLE and len(items) != WHOLE)):
        whole = " of the whole validation split of HellaSwag" if n == WHOLE else ""
        raise UserError(
            f"{place} holds {len(items):,} items, not the {n:,}{whole} that benchmark.items asks for; get the whole, "
            "or set items to null for what is there"
        )
    return items[:n]


def write_items(path: Path, items: Sequence[dict[str, Any]]) -> None:
    """Write items as JSON lines in ASCII. Raises UserError without any item."""
    if not items:
        raise UserError(f"{path} would hold no item; choose another benchmark.source")
    write_text(path, "".join(json.dumps(item) + "\n" for item in items))


def heldout_items(documents: Iterator[str], config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Items that ask which of four endings continues a passage; the other three continue passages of other documents.

    Passages have context_words + ending_words words and do not overlap. White space between words becomes one line end
    or one space, since with indentation and tables endings of equally many words would differ much in tokens. Each
    ending is prose (`is_prose`) and used once. The choice of passages, the wrong endings and the place of the right one
    follow from config.seed; with all of a split in use, config.max_per_document leaves items out and changes none.
    `source_id` is the number of the document in the test split. Returns config.items items, or as many as there are.
    Raises UserError if these are fewer than MIN_ITEMS, or come from fewer than four documents.
    """
    by_document = _gather(documents, config)
    n_items = _count_usable(by_document, config)
    if n_items < MIN_ITEMS or len(by_document) < ENDINGS:
        raise UserError(
            f"the test split gives {n_items} passages of {config.context_words} + {config.ending_words} words "
            f"from {len(by_document)} documents; a benchmark needs {MIN_ITEMS} from {ENDINGS}: raise "
            "prepare.test_percent, the number of documents or benchmark.max_per_document, or lower "
            "benchmark.context_words"
        )
    passages = [(i, passage) for i, found in enumerate(by_document) for passage in found]
    rng = np.random.Generator(np.random.PCG64(config.seed))
    items: list[dict[str, Any]] = []
    taken: Counter[int] = Counter()
    for chosen in rng.permutation(len(passages)).tolist():
        i, (document, context, right) = passages[chosen]
        # Drawn for passages over the limit too, so that the limit does not change the other items.
        endings, label = _draw_endings(rng, by_document, i, right)
        if taken[document] != config.max_per_document:
            taken[document] += 1
            contexts = {"ctx_a": context, "ctx_b": "", "ctx": context}
            answers = {"endings": endings, "label": label, "source_id": f"test~{document}"}
            items.append({"ind": len(items), "activity_label": "Continuation", **contexts, **answers})
        if len(items) == config.items:
            break
    return items


def _draw_endings(
    rng: np.random.Generator, by_document: list[list[Passage]], i: int, right: str
) -> tuple[list[str], int]:
    """The right ending, of document i, among three of other documents, and its place."""
    # Indices of other documents: those from `i` on are one higher.
    others = rng.choice(len(by_document) - 1, ENDINGS - 1, replace=False)
    others += others >= i
    endings = [by_document[other][rng.integers(len(by_document[other]))].ending for other in others]
    label = int(rng.integers(ENDINGS))
    endings.insert(label, right)
    return endings, label


def _gather(documents: Iterator[str], config: BenchmarkConfig) -> list[list[Passage]]:
    """Passages by document, their endings distinct; documents without any are left out."""
    assert config.items  # BenchmarkConfig refuses it
    by_document: list[list[Passage]] = []
    endings: set[str] = set()
    usable = 0
    for number, text in enumerate(documents):
        if found := _passages(number, text, config, endings):
            by_document.append(found)
            usable += _count_usable([found], config)
        if usable >= PASSAGES_PER_ITEM * config.items:
            break
    return by_document


def _count_usable(by_document: Sequence[Sequence[Passage]], config: BenchmarkConfig) -> int:
    """Number of passages within the limit for each document."""
    return sum(min(len(found), config.max_per_document or len(found)) for found in by_document)


def _passages(number: int, text: str, config: BenchmarkConfig, endings: set[str]) -> list[Passage]:
    """Disjoint passages of one document whose endings are prose and not among `endings`, to which they are added."""
    assert config.context_words and config.ending_words  # BenchmarkConfig refuses it
    text = re.sub(r"\s+", lambda gap: "\n" if "\n" in gap[0] else " ", text)
    spans = [word.span() for word in re.finditer(r"\S+", text)]
    found = []
    start = 0
    while (end := start + config.context_words + config.ending_words) <= len(spans):
        middle = start + config.context_words
        ending = text[spans[middle][0] : spans[end - 1][1]]
        if ending in endings or not is_prose(ending):
            start += config.ending_words
            continue
        endings.add(ending)
        found.append(Passage(number, text[spans[start][0] : spans[middle - 1][1]], ending))
        start = end
    return found


def is_prose(text: str) -> bool:
    """Whether at least half the words are of letters, with punctuation around them, and none is overlong.

    Text with square brackets is refused too: the harness protocol of HellaSwag deletes what is between them.
    """
    words = text.split()
    of_letters = sum(word.strip("\"'`*.,:;!?()").isalpha() for word in words)
    return 2 * of_letters >= len(words) and max(map(len, words)) <= LONGEST_WORD and not {"[", "]"} & set(text)


def _read_hub(config: BenchmarkConfig) -> Iterator[dict[str, Any]]:
    remedy = "set benchmark.source to file and benchmark.path to a local copy, or to heldout"
    for name, path in open_dataset(config.dataset, config.revision, config.files).fetch():
        try:
            rows = pq.read_table(path).to_pylist()
            for number, row in enumerate(rows, start=1):
                # The hub's copy holds the label as a string.
                yield check_item({**row, "label": int(row.get("label", -1))}, f"{config.dataset}/{name}:{number}")
        except UserError:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{config.dataset}: {name} cannot be read ({error}); {remedy}") from error
