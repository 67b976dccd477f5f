"""From a source of documents to the corpus: screen, drop duplicates, split by hash, write."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from tqdm import tqdm

from gpt2.corpus import SPLITS, Document, new_corpus
from gpt2.docstrings import package_version, read_docstrings
from gpt2.files import UserError
from gpt2.params import Config
from gpt2.sources import read_folder, read_hub

LOG_SECONDS = 30
# Two texts share 128 bits of SHA-256 by chance once in 10^24 corpora of ten million documents.
DIGEST_BYTES = 16
Percent = Annotated[float, Field(gt=0, lt=100)]
log = logging.getLogger(__name__)


class PrepareConfig(Config):
    """Section `prepare`: where documents come from and which are kept. Fields of other sources may be absent."""

    source: Literal["docs", "files", "fineweb_edu"]
    # docs: installed distributions, in this order.
    packages: tuple[str, ...] = ()
    # files: a folder of Parquet, JSONL or gzipped JSONL files, read recursively.
    path: Path | None = None
    # fineweb_edu: a dataset of the Hugging Face hub, its subset and commit.
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    # files, fineweb_edu: the column that holds the text.
    text_column: str = "text"
    # Documents to keep in all splits together; null keeps all.
    max_documents: PositiveInt | None = None
    # Characters below which a document is dropped.
    min_chars: NonNegativeInt
    val_percent: Percent
    test_percent: Percent

    @model_validator(mode="after")
    def _complete(self) -> "PrepareConfig":
        needed = {
            "docs": ("packages", "a list of installed packages, such as [numpy]"),
            "files": ("path", "a folder of Parquet or JSONL files"),
            "fineweb_edu": ("dataset", "a dataset of the hub, such as HuggingFaceFW/fineweb-edu"),
        }
        key, value = needed[self.source]
        if not getattr(self, key):
            raise ValueError(f"source={self.source} needs {key}; set it to {value}")
        if self.val_percent + self.test_percent >= 100:
            raise ValueError(
                f"val_percent={self.val_percent} and test_percent={self.test_percent} leave nothing for train; "
                "lower them to a sum below 100"
            )
        return self


def prepare(config: PrepareConfig, folder: Path, workers: int) -> dict[str, int | float | str]:
    """Write the corpus to `folder` and return its figures.

    The split of a document depends on its text alone, so neither the order of the files nor `workers`, the number of
    processes that read, moves one. Of equal texts the first is kept. Raises UserError, and leaves an earlier corpus as
    it was, if the source cannot be read or a split would be empty.
    """
    dropped: Counter[str] = Counter()
    with new_corpus(folder) as writers:
        for document, digest in _kept(_logged(_read(config, workers)), config, dropped):
            writers[_split(digest, config)].add(_titled(document) if config.source == "docs" else document)
        n_kept = sum(writer.documents for writer in writers.values())
        if not n_kept:
            raise UserError(
                f"no document is left: {dropped['empty']} are empty and {dropped['short']} are shorter than "
                f"prepare.min_chars={config.min_chars}; lower it or choose another source"
            )
    figures = {"documents": n_kept, "bytes": sum(writer.bytes for writer in writers.values())}
    for split in SPLITS:
        figures[f"documents_{split}"] = writers[split].documents
        figures[f"bytes_{split}"] = writers[split].bytes
    for split in ("val", "test"):
        figures[f"{split}_percent"] = round(100 * writers[split].documents / n_kept, 4)
    figures |= {f"{kind}_dropped": dropped[kind] for kind in ("duplicates", "empty", "short")}
    return figures | _versions(config)


def _read(config: PrepareConfig, workers: int) -> Iterator[Document]:
    if config.source == "docs":
        return read_docstrings(config.packages, workers)
    if config.source == "files":
        return read_folder(config.path, config.text_column)
    return read_hub(config.dataset, config.subset, config.revision, config.text_column)


def _kept(
    documents: Iterator[Document], config: PrepareConfig, dropped: Counter[str]
) -> Iterator[tuple[Document, bytes]]:
    """Yield the documents to keep with the digests of their texts; count the others by reason in `dropped`.

    Memory grows by about 100 bytes a document, for the digests of those already seen.
    """
    seen: set[bytes] = set()
    for document in documents:
        if not document.text.strip():
            dropped["empty"] += 1
            continue
        if len(document.text) < config.min_chars:
            dropped["short"] += 1
            continue
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()[:DIGEST_BYTES]
        if digest in seen:
            dropped["duplicates"] += 1
            continue
        seen.add(digest)
        yield document, digest
        if len(seen) == config.max_documents:
            return


def _split(digest: bytes, config: PrepareConfig) -> str:
    position = 100 * int.from_bytes(digest[:8], "big") / 2**64
    if position < config.test_percent:
        return "test"
    return "val" if position < config.test_percent + config.val_percent else "train"


def _titled(document: Document) -> Document:
    return Document(f"{document.id}\n\n{document.text}", document.id)


def _logged(documents: Iterator[Document]) -> Iterator[Document]:
    """Pass documents through; report their number and rate at intervals, and on a terminal as a bar."""
    started = logged = time.monotonic()
    n_bytes = 0
    # disable=None: no bar where stderr is not a terminal.
    for n_read, document in enumerate(tqdm(documents, unit=" documents", disable=None), start=1):
        n_bytes += len(document.text.encode("utf-8"))
        if (now := time.monotonic()) - logged > LOG_SECONDS:
            logged = now
            log.info("%d documents read, %.1f MB, %.1f MB/s", n_read, n_bytes / 1e6, n_bytes / 1e6 / (now - started))
        yield document


def _versions(config: PrepareConfig) -> dict[str, str]:
    """What the text was read from: package versions, or the dataset's revision."""
    if config.source == "docs":
        return {f"{package}_version": package_version(package) for package in config.packages}
    if config.source == "fineweb_edu":
        return {"revision": config.revision or "latest"}
    return {}
