"""Documents from Parquet, JSON lines and text files, local or of the hub, as Arrow batches in bounded memory."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.pipeline.files import UserError
from gpt2.prepare.hub import open_dataset

# A batch ends with the document that reaches one of these.
BATCH_DOCUMENTS, BATCH_BYTES = 1_000, 2**24
# Rows decoded at once, at most, and their bytes if all are of mean length: few, since some may be far longer.
PARQUET_ROWS, PARQUET_BYTES = 32, 2**18
READ_BUFFER = 2**20
# Files of the hub that are downloaded while another is read.
HUB_AHEAD = 3
# What is raised for a file that is cut off, not UTF-8, not JSON or not of its format.
READ_ERRORS = (pa.ArrowException, ValueError, OSError, EOFError, zlib.error)
CODECS = {".gz": "gzip", ".zst": "zstd"}
T = TypeVar("T")


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
    """All files below `folder` that can be read, in order of their relative names, with forward slashes."""
    if not folder.is_dir():
        raise UserError(f"prepare.path = {str(folder)!r} is not a folder; set it to one with Parquet or JSONL files")
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name.endswith(tuple(READERS))]
    if not names:
        raise UserError(f"prepare.path = {str(folder)!r} holds no file named *{', *'.join(READERS)}; add one")
    paths = [(name, folder / name) for name in names]
    return Source(paths, len(paths), sum(path.stat().st_size for _, path in paths))


def find_on_hub(
    dataset: str, revision: str, pattern: str | None, config: str | None, split: str, whole: bool
) -> tuple[Source, str]:
    """The files of a hub data set, and its commit. Several are fetched at once if the `whole` of it will be read."""
    found = open_dataset(dataset, revision, pattern, config, split, tuple(READERS))
    if strange := [name for name in found.names if not name.endswith(tuple(READERS))]:
        raise UserError(
            f"prepare.files = {pattern!r} matches {strange[0]} of {dataset}, which is none of *{', *'.join(READERS)}; "
            "narrow it, or take prepare.revision=refs/convert/parquet, where the hub keeps every data set as Parquet"
        )
    return Source(found.fetch(HUB_AHEAD if whole else 0), len(found.names), found.n_bytes), found.commit


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


def grouped(sized: Iterable[tuple[T, int]], most: int) -> Iterator[list[T]]:
    """Collect values given with their bytes into lists of `most` values, or of BATCH_BYTES if that is less."""
    group: list[T] = []
    room = BATCH_BYTES
    for value, n_bytes in sized:
        group.append(value)
        room -= n_bytes
        if len(group) == most or room <= 0:
            yield group
            group, room = [], BATCH_BYTES
    if group:
        yield group


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
    # With pre_buffer a whole row group would be in memory.
    with pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False) as file:
        names = _choose(columns, file.schema_arrow.names)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row_bytes = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
        n_rows = max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(1, row_bytes)))
        parts = file.iter_batches(n_rows, columns=names, use_threads=False)
        for some in grouped(((part, part.nbytes) for part in parts), BATCH_DOCUMENTS // n_rows):
            rows = pa.concat_batches(some)
            yield rows, n_bytes * rows.num_rows / file.metadata.num_rows


def _read_jsonl(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    with _unpacked(path) as (file, lines):
        position = 0
        parsed = ((_parse(line, number), len(line)) for number, line in enumerate(lines, start=1) if line.strip())
        for documents in grouped(parsed, BATCH_DOCUMENTS):
            names = _choose(columns, dict.fromkeys(key for document in documents for key in document))
            values = {name: [document.get(name) for document in documents] for name in names}
            if "id" in values:
                values["id"] = [None if value is None else str(value) for value in values["id"]]
            before, position = position, file.tell()
            yield pa.record_batch({name: pa.array(column) for name, column in values.items()}), position - before


def _read_text(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    """The whole file is one document."""
    _choose(columns, columns[:1])
    with _unpacked(path) as (_, content):
        text = pa.array([content.read()], pa.binary()).cast(pa.string())
    yield pa.record_batch({columns[0]: text}), path.stat().st_size


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The open file, and its content without compression."""
    with open(path, "rb") as file:
        if codec := CODECS.get(path.suffix):
            yield file, BufferedReader(pa.CompressedInputStream(file, codec), READ_BUFFER)
        else:
            yield file, file


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"line {number}: a line must hold a JSON object, not {type(document).__name__}")
    return document


def _choose(columns: list[str], found: Iterable[str]) -> list[str]:
    """Those of `found` to read: `columns`, the first of them the text, and id if there is one."""
    text_column, *others = columns
    if text_column not in found:
        raise UserError(
            f"lacks prepare.text_column = {text_column!r} among its columns {', '.join(found)}; name one of them"
        )
    if missing := [name for name in others if name not in found]:
        raise UserError(f"lacks {', '.join(missing)}, its columns are {', '.join(found)}; drop that filter of prepare")
    return [name for name in dict.fromkeys([*columns, "id"]) if name in found]


# By the endings of the names: each yields the rows of a file with at least the columns it is given (and id, if there is
# one), and the bytes of the file read for them.
READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[pa.RecordBatch, float]]]] = {
    ".parquet": _read_parquet,
    **{f".jsonl{packed}": _read_jsonl for packed in ("", *CODECS)},
    **{f".json{packed}": _read_jsonl for packed in ("", *CODECS)},
    **{f".txt{packed}": _read_text for packed in ("", *CODECS)},
}
