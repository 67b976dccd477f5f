"""Documents from Parquet and JSONL files, local or of the Hugging Face hub, as Arrow batches in bounded memory."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.pipeline.files import UserError
from gpt2.prepare.hub import MOST_AHEAD, open_dataset

BATCH_DOCUMENTS = 1_000
READ_BUFFER = 2**20
# What comes through when a file is cut off, not UTF-8, not JSON or not of its format.
READ_ERRORS = (pa.ArrowException, ValueError, OSError, EOFError, zlib.error)


class Batch(NamedTuple):
    """Documents in order: columns text and id, without nulls, and those asked for; their file, bytes read of it."""

    rows: pa.RecordBatch
    file: str = ""
    n_bytes: float = 0


@dataclass(frozen=True)
class Source:
    """Files to read, as pairs of name and path that may take time to come, their number and their size."""

    files: Iterable[tuple[str, Path]]
    n_files: int
    n_bytes: int


def find_files(folder: Path) -> Source:
    """All Parquet and JSONL files below `folder` in order of their relative names, with forward slashes."""
    if not folder.is_dir():
        raise UserError(f"prepare.path = {str(folder)!r} is not a folder; set it to one with Parquet or JSONL files")
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name.endswith(tuple(READERS))]
    if not names:
        raise UserError(f"prepare.path = {str(folder)!r} holds no file named *{', *'.join(READERS)}; add one")
    paths = [(name, folder / name) for name in names]
    return Source(paths, len(paths), sum(path.stat().st_size for _, path in paths))


def find_on_hub(dataset: str, revision: str, pattern: str, whole: bool) -> tuple[Source, str]:
    """The files of a hub dataset, and its commit. Several are fetched at once if the `whole` of it will be read."""
    found = open_dataset(dataset, revision, pattern)
    if strange := [name for name in found.names if not name.endswith(tuple(READERS))]:
        raise UserError(
            f"prepare.files = {pattern!r} matches {strange[0]} of {dataset}, which is none of *{', *'.join(READERS)}; "
            "narrow it, or take prepare.revision=refs/convert/parquet, where the hub keeps every data set as Parquet"
        )
    return Source(found.fetch(MOST_AHEAD if whole else 0), len(found.names), found.n_bytes), found.commit


def read_source(source: Source, text_column: str, numbers: Iterable[str], strings: Iterable[str]) -> Iterator[Batch]:
    """Yield all documents of the files, with the columns `numbers` as float64 and `strings` as text.

    The id of a document is its column `id`, or else file and row, counted from one. A null text is "". Raises UserError
    naming the file if one cannot be read, has no rows, or lacks a column.
    """
    wanted = dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(strings, pa.string())
    for name, path in source.files:
        reader = next(reader for ending, reader in READERS.items() if name.endswith(ending))
        n_read = 0
        try:
            for rows, share in reader(path, [text_column, *wanted]):
                yield Batch(_conform(rows, name, n_read, text_column, wanted), name, share)
                n_read += rows.num_rows
            if not n_read:
                raise UserError("has no rows; remove it")
        except UserError as error:
            raise UserError(f"{path} {error}") from error
        except READ_ERRORS as error:
            raise UserError(f"{path} cannot be read ({error}); replace it or remove it from prepare.path") from error


def _conform(
    rows: pa.RecordBatch, name: str, n_read: int, text_column: str, wanted: Mapping[str, pa.DataType]
) -> pa.RecordBatch:
    """The columns text and id, and those wanted, each of its type."""
    rows.validate(full=True)
    kind = rows[text_column].type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in is_text):
        raise UserError(f"has in prepare.text_column = {text_column!r} values of {kind}, not strings; name another")
    if "id" in rows.schema.names:
        ids = rows["id"].cast(pa.string()).fill_null("")
    else:
        ids = pa.array([f"{name}:{row}" for row in range(n_read + 1, n_read + rows.num_rows + 1)], pa.string())
    columns = {"text": rows[text_column].cast(pa.string()).fill_null(""), "id": ids}
    return pa.record_batch(columns | {key: rows[key].cast(kind) for key, kind in wanted.items()})


def _read_parquet(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    n_bytes = path.stat().st_size
    with pq.ParquetFile(path, buffer_size=READ_BUFFER) as file:
        names = file.schema_arrow.names
        _require(columns, names)
        chosen = [name for name in dict.fromkeys([*columns, "id"]) if name in names]
        for rows in file.iter_batches(BATCH_DOCUMENTS, columns=chosen, use_threads=False):
            yield rows, n_bytes * rows.num_rows / file.metadata.num_rows


def _read_jsonl(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    with open(path, "rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as lines:
        position = 0
        parsed = (_parse(line, number) for number, line in enumerate(lines, start=1) if line.strip())
        while documents := list(islice(parsed, BATCH_DOCUMENTS)):
            names = dict.fromkeys(key for document in documents for key in document)
            _require(columns, names)
            chosen = [name for name in dict.fromkeys([*columns, "id"]) if name in names]
            values = {name: [document.get(name) for document in documents] for name in chosen}
            if "id" in values:
                values["id"] = [None if value is None else str(value) for value in values["id"]]
            before, position = position, file.tell()
            yield pa.record_batch({name: pa.array(column) for name, column in values.items()}), position - before


def _parse(line: bytes, number: int) -> dict:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"line {number}: a line must hold a JSON object, not {type(document).__name__}")
    return document


def _require(columns: list[str], found: Iterable[str]) -> None:
    text_column, *others = columns
    if text_column not in found:
        raise UserError(
            f"lacks prepare.text_column = {text_column!r} among its columns {', '.join(found)}; name one of them"
        )
    if missing := [name for name in others if name not in found]:
        raise UserError(f"lacks {', '.join(missing)}, its columns are {', '.join(found)}; drop that filter of prepare")


# By the endings of the names: each yields the rows of a file with at least the columns it is given (and id, if there is
# one), and the bytes of the file read for them.
READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[pa.RecordBatch, float]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
}
