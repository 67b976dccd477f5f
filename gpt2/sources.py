"""Documents from a local folder or from the Hugging Face hub, streamed through `datasets` in bounded memory."""

import glob
import logging
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from gpt2.corpus import Document
from gpt2.files import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Name endings of the files that are read, and the `datasets` loader of each.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json"}
BATCH_DOCUMENTS = 1_000
# What `datasets` lets through when a file is cut off, not UTF-8, not JSON or not of its format, or the network fails.
READ_ERRORS = (pa.ArrowException, ValueError, OSError, EOFError, zlib.error)


def read_folder(path: Path, text_column: str) -> Iterator[Document]:
    """Yield the documents of all Parquet and JSONL files below `path`, files in order of their relative names.

    The id of a document is its column `id`, or else file and row, counted from one. A null text is "". Raises UserError
    naming the file if one cannot be read, has no rows, or has no column `text_column` of strings.
    """
    # Imported here and below: importing datasets takes a second that other sources and worker processes need not spend.
    import datasets

    # The error says what these messages say, with the file's name.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    for name in _data_files(path):
        file = path / name
        loader = next(loader for ending, loader in LOADERS.items() if name.endswith(ending))
        try:
            with tempfile.TemporaryDirectory() as cache:
                rows = datasets.load_dataset(
                    loader, data_files=glob.escape(str(file)), split="train", streaming=True, cache_dir=cache
                )
                yield from _documents(rows, name, text_column)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except StopIteration as error:
            raise UserError(f"{file} has no rows; remove it from prepare.path") from error
        except READ_ERRORS as error:
            raise UserError(f"{file} cannot be read ({error}); replace it or remove it from prepare.path") from error


def read_hub(dataset: str, subset: str | None, revision: str | None, text_column: str) -> Iterator[Document]:
    """Yield the documents of a hub dataset's split train. Raises UserError if it cannot be reached or read."""
    rows = open_hub(dataset, subset, revision, "train", "set prepare.source to files and prepare.path to a local copy")
    try:
        yield from _documents(rows, dataset, text_column)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(f"{dataset}: reading stopped ({error}); run dvc repro again") from error


def open_hub(dataset: str, subset: str | None, revision: str | None, split: str, remedy: str) -> "IterableDataset":
    """Open one split of a hub dataset as a stream. Raises UserError with the remedy if that fails."""
    import datasets

    try:
        return datasets.load_dataset(dataset, name=subset, revision=revision, split=split, streaming=True)
    except (OSError, ValueError) as error:
        where = ", ".join(f"{key} {value}" for key, value in (("subset", subset), ("revision", revision)) if value)
        raise UserError(f"{dataset} ({where or split}) cannot be opened on the hub ({error}); {remedy}") from error


def _data_files(path: Path) -> list[str]:
    """Names of the data files below `path`, relative to it, with forward slashes, sorted."""
    if not path.is_dir():
        raise UserError(f"prepare.path = {str(path)!r} is not a folder; set it to one with Parquet or JSONL files")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names = [name for name in names if name.endswith(tuple(LOADERS))]
    if not names:
        raise UserError(f"prepare.path = {str(path)!r} holds no file named *{', *'.join(LOADERS)}; add one")
    return names


def _documents(rows: "IterableDataset", source: str, text_column: str) -> Iterator[Document]:
    n_read = 0
    for batch in rows.with_format("arrow").iter(BATCH_DOCUMENTS):
        texts = _text_column(batch, text_column)
        if "id" in batch.column_names:
            ids = map(str, batch["id"].to_pylist())
        else:
            ids = (f"{source}:{row}" for row in range(n_read + 1, n_read + batch.num_rows + 1))
        n_read += batch.num_rows
        yield from (Document(text or "", id) for text, id in zip(texts, ids, strict=True))


def _text_column(batch: pa.Table, name: str) -> list[str | None]:
    if name not in batch.column_names:
        raise UserError(
            f"prepare.text_column = {name!r} is not among the columns {', '.join(batch.column_names)}; name one of them"
        )
    kind = batch[name].type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"prepare.text_column = {name!r} holds {kind}, not strings; name another column")
    return batch[name].to_pylist()
