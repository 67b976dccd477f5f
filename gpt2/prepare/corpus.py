"""The corpus on disk: `<folder>/{train,val,test}/00000.parquet`, … with the columns text and id."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2.pipeline.files import UserError

SPLITS = ("train", "val", "test")
SCHEMA = pa.schema([("text", pa.string()), ("id", pa.string())])
# A row group is what a reader holds in memory at once. Ordinary text reaches the number of documents first.
ROW_GROUP_DOCUMENTS, ROW_GROUP_BYTES = 1_000, 2**24
FILE_DOCUMENTS = 100_000


class Document(NamedTuple):
    """A text and where it comes from: a qualified name, the source's own id, or file and row."""

    text: str
    id: str


def batch_of(documents: Sequence[Document]) -> pa.RecordBatch:
    """Documents as rows of SCHEMA."""
    texts, ids = zip(*documents, strict=True)
    return pa.record_batch([pa.array(texts, pa.string()), pa.array(ids, pa.string())], schema=SCHEMA)


class SplitWriter:
    """Writes the documents of one split in files of FILE_DOCUMENTS.

    A row group ends with the document that reaches ROW_GROUP_DOCUMENTS or ROW_GROUP_BYTES of text.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.documents = self.bytes = 0
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_documents = self._waiting_bytes = 0
        self._file: Any = None

    def add(self, document: Document) -> None:
        """Append a document."""
        self.add_batch(batch_of([document]))

    def add_batch(self, rows: pa.RecordBatch) -> None:
        """Append documents given as rows of SCHEMA; they reach the disk with their row group."""
        while rows.num_rows:
            if self.documents % FILE_DOCUMENTS == 0:
                self._open_next()
            ends = pc.binary_length(rows["text"]).to_numpy().cumsum(dtype=np.int64)
            n = int(np.searchsorted(ends, ROW_GROUP_BYTES - self._waiting_bytes)) + 1
            most = min(ROW_GROUP_DOCUMENTS - self._waiting_documents, FILE_DOCUMENTS - self.documents % FILE_DOCUMENTS)
            n = min(n, most, rows.num_rows)
            self._waiting.append(rows.slice(0, n))
            self._waiting_documents += n
            self._waiting_bytes += int(ends[n - 1])
            self.documents += n
            self.bytes += int(ends[n - 1])
            if self._waiting_documents == ROW_GROUP_DOCUMENTS or self._waiting_bytes >= ROW_GROUP_BYTES:
                self._flush()
            rows = rows.slice(n)

    def close(self) -> None:
        """Write what waits and finish the last file."""
        if self._file is not None:
            self._flush()
            with self._written():
                self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Let go of a file that will be removed."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open_next(self) -> None:
        self.close()
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.documents // FILE_DOCUMENTS:05d}.parquet"
            # Texts are long and all different: a dictionary of them, or the least and greatest, would be of no use.
            options = {"use_dictionary": False, "write_statistics": False}
            self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd", **options)

    def _flush(self) -> None:
        if self._waiting:
            with self._written():
                self._file.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
            self._waiting = []
            self._waiting_documents = self._waiting_bytes = 0

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error}) after {self.bytes / 1e6:,.0f} MB of text; make room and "
                "run dvc repro again (python -m gpt2.check shows how much is needed)"
            ) from error


@contextmanager
def new_corpus(folder: Path) -> Iterator[dict[str, SplitWriter]]:
    """Yield a writer per split; when the block succeeds, the new corpus replaces what is at `folder`.

    If the block raises, or a split got no document (UserError), the old corpus stays as it was. The next run removes
    what a killed one left.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    writers = {split: SplitWriter(temporary / split) for split in SPLITS}
    try:
        yield writers
        for writer in writers.values():
            writer.close()
        if empty := [split for split, writer in writers.items() if not writer.documents]:
            counts = ", ".join(f"{split} {writer.documents}" for split, writer in writers.items())
            raise UserError(
                f"{folder}: no document fell into {', '.join(empty)} (documents: {counts}); "
                "give prepare more documents or raise prepare.val_percent and prepare.test_percent"
            )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def read_split(folder: Path, split: str) -> Iterator[str]:
    """Yield the texts of a split in order, one row group in memory. Raises UserError if it is absent or damaged."""
    files = sorted((folder / split).glob("*.parquet"))
    if not files:
        raise UserError(f"{folder / split} holds no Parquet file; run `dvc repro prepare`")
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                for group in range(table.num_row_groups):
                    yield from table.read_row_group(group, columns=["text"])["text"].to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); run `dvc repro -f prepare`") from error
