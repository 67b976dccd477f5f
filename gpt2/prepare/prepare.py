"""From a source of documents to the corpus: screen, drop duplicates, split by hash, write.

Work is done on Arrow batches: a Python object for each document would halve the speed. One process reads, decides and
writes, so that order and result cannot depend on anything else.
"""

import hashlib
import json
import logging
import math
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from tqdm import tqdm

from gpt2.pipeline.files import UserError, read_json
from gpt2.pipeline.params import Config
from gpt2.pipeline.quantities import show_time
from gpt2.prepare.corpus import SPLITS, Document, batch_of, new_corpus
from gpt2.prepare.dedup import SeenKeys
from gpt2.prepare.docstrings import package_version, read_docstrings
from gpt2.prepare.hub import COMMIT
from gpt2.prepare.sources import BATCH_DOCUMENTS, Batch, Source, find_files, find_on_hub, grouped, read_source

LOG_SECONDS = 30
Percent = Annotated[float, Field(gt=0, lt=100)]
# Parameters that filter by a column of the source, as FineWeb-Edu has them: the column, and what a row must be. A row
# without a value is dropped.
STRING_FILTERS = {"language": ("language", pc.equal)}
NUMBER_FILTERS = {"min_language_score": ("language_score", pc.greater_equal), "min_score": ("score", pc.greater_equal)}
FILTERS = STRING_FILTERS | NUMBER_FILTERS
log = logging.getLogger(__name__)


class PrepareConfig(Config):
    """Section `prepare`: where documents come from and which are kept. Fields of other sources may be absent."""

    # fineweb_edu is hub under the name of the data set of the reference run.
    source: Literal["docs", "files", "hub", "fineweb_edu"]
    # docs: installed distributions, in this order.
    packages: tuple[str, ...] = ()
    # files: a folder of Parquet, JSON lines or text files, read recursively.
    path: Path | None = None
    # hub: a data set of the Hugging Face hub, and its commit or branch.
    dataset: str | None = None
    revision: str | None = None
    # hub: a pattern for the names of its files, or else a config (null: the default one) and a split.
    files: str | None = None
    config: str | None = None
    split: str = "train"
    # files, hub: the column that holds the text.
    text_column: str = "text"
    # Documents, and bytes of their text in UTF-8, to keep in all splits together; null keeps all.
    max_documents: PositiveInt | None = None
    max_bytes: PositiveInt | None = None
    # Characters below which a document is dropped.
    min_chars: NonNegativeInt
    # files, hub: what the columns language, language_score and score must hold; null asks nothing.
    language: str | None = None
    min_language_score: float | None = None
    min_score: float | None = None
    val_percent: Percent
    test_percent: Percent

    @model_validator(mode="after")
    def _complete(self) -> "PrepareConfig":
        hub = {
            "dataset": "a data set of the hub, such as HuggingFaceFW/fineweb-edu",
            "revision": "a commit of it; main finds out the newest",
        }
        needed = {
            "docs": {"packages": "a list of installed packages, such as [numpy]"},
            "files": {"path": "a folder of Parquet, JSONL or text files"},
            "hub": hub,
            "fineweb_edu": hub,
        }
        for key, value in needed[self.source].items():
            if not getattr(self, key):
                raise ValueError(f"source={self.source} needs {key}; set it to {value}")
        if self.files is not None and self.config is not None:
            raise ValueError(f"files={self.files} and config={self.config} exclude each other; set one to null")
        if self.source == "docs" and (given := [key for key in FILTERS if getattr(self, key) is not None]):
            raise ValueError(f"source=docs has no column for {', '.join(given)}; set it to null")
        if self.val_percent + self.test_percent >= 100:
            raise ValueError(
                f"val_percent={self.val_percent} and test_percent={self.test_percent} leave nothing for train; "
                "lower them to a sum below 100"
            )
        return self


def prepare(
    config: PrepareConfig, folder: Path, workers: int, earlier: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Write the corpus to `folder` and return its figures.

    The split of a document depends on its text alone, so neither the order of the files nor `workers`, the number of
    processes that parse documentation, moves one. Of equal texts the first is kept. `earlier` are the figures of a run
    before, with the commit that it read. Raises UserError, and leaves an earlier corpus as it was, if the source
    cannot be read, has changed since, or a split would be empty.
    """
    dropped: Counter[str] = Counter()
    batches, origin = _open(config, workers, earlier or {})
    bounds = _bounds(config)
    with new_corpus(folder) as writers:
        for kept in _kept(batches, config, dropped):
            place = np.searchsorted(bounds, kept.digests, side="right")
            for number, split in enumerate(("test", "val", "train")):
                writers[split].add_batch(kept.rows.filter(pa.array(place == number)))
        n_kept = sum(writer.documents for writer in writers.values())
        if not n_kept:
            filtered = "".join(f", {dropped[key]} fail prepare.{key}" for key in FILTERS if dropped[key])
            raise UserError(
                f"no document is left: {dropped['empty']} are empty and {dropped['short']} are shorter than "
                f"prepare.min_chars={config.min_chars}{filtered}; ask for less or choose another source"
            )
    figures: dict[str, Any] = {"documents": n_kept, "bytes": sum(writer.bytes for writer in writers.values())}
    for split in SPLITS:
        figures[f"documents_{split}"] = writers[split].documents
        figures[f"bytes_{split}"] = writers[split].bytes
    for split in ("val", "test"):
        figures[f"{split}_percent"] = round(100 * writers[split].documents / n_kept, 4)
    reasons = ["duplicates", "empty", "short", *(key for key in FILTERS if getattr(config, key) is not None)]
    return figures | {f"{reason}_dropped": dropped[reason] for reason in reasons} | origin


def read_earlier(path: Path) -> dict[str, object]:
    """The figures of the last run: those at `path`, or where DVC has removed them those of Git's last commit."""
    try:
        return read_json(path)
    except UserError:
        pass
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{path.as_posix()}"], capture_output=True)
        return json.loads(shown.stdout) if shown.returncode == 0 else {}
    except (OSError, ValueError):
        return {}


def _open(config: PrepareConfig, workers: int, earlier: Mapping[str, object]) -> tuple[Iterator[Batch], dict[str, str]]:
    """The documents, and figures that say what they come from."""
    origin: dict[str, str] = {}
    if config.source == "docs":
        documents = read_docstrings(config.packages, workers)
        return _logged(_in_batches(documents)), {f"{name}_version": package_version(name) for name in config.packages}
    if config.source == "files":
        assert config.path is not None  # PrepareConfig refuses it
        source = find_files(config.path)
    else:
        assert config.dataset is not None and config.revision is not None  # likewise
        whole = config.max_documents is None and config.max_bytes is None
        place = (config.dataset, config.revision, config.files, config.config, config.split)
        source, commit = find_on_hub(*place, whole)
        _refuse_change(config.dataset, config.revision, commit, earlier)
        origin = {"dataset": config.dataset, "revision": commit}
    numbers, strings = (
        [column for key, (column, _) in filters.items() if getattr(config, key) is not None]
        for filters in (NUMBER_FILTERS, STRING_FILTERS)
    )
    return _logged(read_source(source, config.text_column, numbers, strings), source), origin


def _refuse_change(dataset: str, revision: str, commit: str, earlier: Mapping[str, object]) -> None:
    before = earlier.get("revision")
    if not COMMIT.fullmatch(revision) and earlier.get("dataset") == dataset and before != commit:
        raise UserError(
            f"prepare.revision={revision} of {dataset} was {before} in the last run and is {commit} now; set it to the "
            "one that is meant"
        )


def _in_batches(documents: Iterable[Document]) -> Iterator[Batch]:
    for some in grouped(((document, len(document.text)) for document in documents), BATCH_DOCUMENTS):
        rows = batch_of(some)
        yield Batch(rows, n_bytes=rows["text"].nbytes)


class Kept(NamedTuple):
    """Documents to keep, and the first 64 bits of the SHA-256 of each text."""

    rows: pa.RecordBatch
    digests: np.ndarray


def _kept(batches: Iterable[Batch], config: PrepareConfig, dropped: Counter[str]) -> Iterator[Kept]:
    """Yield the documents to keep, up to the slice that is asked for; count the others by reason in `dropped`.

    Texts are duplicates if the second 64 bits of their SHA-256 are equal: among ten million documents that happens by
    chance in 1 of 370,000 corpora.
    """
    seen = SeenKeys()
    limits = (config.max_documents, config.max_bytes)
    room_documents, room_bytes = (math.inf if limit is None else limit for limit in limits)
    for rows, *_ in batches:
        reasons = _faults(rows, config)
        good = reasons == ""
        rows = rows.select(["text", "id"])
        digests = _digests(rows["text"].filter(pa.array(good)))
        new = seen.add(digests[:, 1])
        reasons[np.flatnonzero(good)[~new]] = "duplicates"
        kept, digests = np.flatnonzero(reasons == ""), digests[new, 0]
        sizes = pc.binary_length(rows["text"].take(pa.array(kept))).to_numpy().cumsum()
        fit = int(min(room_documents, np.searchsorted(sizes, room_bytes, side="right"), len(kept)))
        # What follows the end of the slice is not counted.
        read = len(reasons) if fit == len(kept) else kept[fit]
        dropped.update(reasons[:read][reasons[:read] != ""].tolist())
        rows = rows.take(pa.array(kept[:fit]))
        if config.source == "docs":
            rows = rows.set_column(0, "text", pc.binary_join_element_wise(rows["id"], rows["text"], "\n\n"))
        yield Kept(rows, digests[:fit])
        room_documents -= fit
        room_bytes -= int(sizes[fit - 1]) if fit else 0
        if fit < len(kept) or not room_documents or not room_bytes:
            return


def _faults(rows: pa.RecordBatch, config: PrepareConfig) -> np.ndarray:
    """The reason why each row is dropped; "" if it stays."""
    sound = {
        "empty": pc.not_equal(pc.utf8_ltrim_whitespace(rows["text"]), ""),
        "short": pc.greater_equal(pc.utf8_length(rows["text"]), config.min_chars),
    }
    for key, (column, holds) in FILTERS.items():
        if (value := getattr(config, key)) is not None:
            sound[key] = holds(rows[column], value).fill_null(False)
    reasons = np.full(rows.num_rows, "", object)
    for reason, passes in sound.items():
        reasons[(reasons == "") & ~passes.to_numpy(zero_copy_only=False)] = reason
    return reasons


def _digests(texts: pa.StringArray) -> np.ndarray:
    """The first 16 bytes of the SHA-256 of each text in UTF-8 as two numbers, (N, 2) uint64."""
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.zeros((0, 2), np.uint64)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].tolist()
    view = memoryview(data)
    parts = [hashlib.sha256(view[start:end]).digest()[:16] for start, end in pairwise(ends)]
    return np.frombuffer(b"".join(parts), ">u8").astype(np.uint64).reshape(-1, 2)


def _bounds(config: PrepareConfig) -> np.ndarray:
    """Where among 2^64 numbers the shares of test and of val end."""
    percents = (config.test_percent, config.test_percent + config.val_percent)
    return np.array([math.ceil(Fraction(percent) / 100 * 2**64) for percent in percents], np.uint64)


def _logged(batches: Iterable[Batch], source: Source | None = None) -> Iterator[Batch]:
    """Pass batches through; log at intervals how far they are, the rate and the time left, on a terminal as a bar."""
    started = logged = time.monotonic()
    n_text, n_bytes = 0, 0.0
    files: set[str] = set()
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=source.n_bytes if source else None, unit="B", unit_scale=True, disable=None) as bar:
        for batch in batches:
            yield batch
            n_text += batch.rows["text"].nbytes
            n_bytes += batch.n_bytes
            files.add(batch.file)
            bar.update(batch.n_bytes)
            if (now := time.monotonic()) - logged > LOG_SECONDS:
                logged, seconds = now, now - started
                progress = f"{n_text / 1e6:.0f} MB of text, {n_text / 1e6 / seconds:.1f} MB/s"
                if source and n_bytes:
                    left = show_time(seconds * (source.n_bytes / n_bytes - 1))
                    progress += f", file {len(files)} of {source.n_files}, {left} left if all is read"
                log.info(progress)
