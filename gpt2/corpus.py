"""The corpus on disk: `<folder>/{train,val,test}/00000.parquet`, … with the columns text and id."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.files import UserError

SPLITS = ("train", "val", "test")
SCHEMA = pa.schema([("text", pa.string()), ("id", pa.string())])
# A row group is what a reader holds in memory at once.
ROW_GROUP_DOCUMENTS = 1_000
FILE_DOCUMENTS = 100_000


class Document(NamedTuple):
    """A text and where it comes from: a qualified name, the source's own id, or file and row."""

    text: str
    id: str


class SplitWriter:
    """Writes the documents of one split in files of FILE_DOCUMENTS and row groups of ROW_GROUP_DOCUMENTS."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.documents = self.bytes = 0
        self._waiting: list[Document] = []
        self._file: pq.ParquetWriter | None = None

    def add(self, document: Document) -> None:
        """Append a document; it reaches the disk with its row group."""
        if self.documents % FILE_DOCUMENTS == 0:
            self._open_next()
        self.documents += 1
        self.bytes += len(document.text.encode("utf-8"))
        self._waiting.append(document)
        if len(self._waiting) == ROW_GROUP_DOCUMENTS:
            self._flush()

    def close(self) -> None:
        """Write what waits and finish the last file."""
        if self._file is not None:
            self._flush()
            self._file.close()
            self._file = None

    def _open_next(self) -> None:
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.documents // FILE_DOCUMENTS:05d}.parquet"
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def _flush(self) -> None:
        if self._waiting:
            columns = [pa.array(values, pa.string()) for values in zip(*self._waiting, strict=True)]
            self._file.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
            self._waiting = []


@contextmanager
def new_corpus(folder: Path) -> Iterator[dict[str, SplitWriter]]:
    """Yield a writer per split; when the block succeeds, the new corpus replaces whatever stood at `folder`.

    If the block raises, or a split got no document (UserError), the old corpus stays as it was.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    writers = {split: SplitWriter(temporary / split) for split in SPLITS}
    try:
        try:
            yield writers
        finally:
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
