"""The rows of a run in progress, as CSV in scratch.

A checkpoint records how long the files are, and a resumed run cuts them to that.
"""

import csv
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

TABLES = {
    "train": ("step", "tokens", "loss", "lr", "grad_norm"),
    "eval": ("step", "tokens", "val_loss", "hellaswag_acc", "hellaswag_acc_norm"),
    # Layer -1 is the embeddings; see layer_norms.py.
    "layers": ("step", "layer", "grad_norm", "activation_norm"),
}
# Columns of whole numbers.
_WHOLE = ("step", "tokens", "layer")
Rows = dict[str, list[list]]


def read_rows(folder: Path, sizes: Mapping[str, int]) -> Rows:
    """Rows in the first `sizes[table]` bytes of each file. Raises ValueError if they were damaged."""
    rows = {}
    for table, columns in TABLES.items():
        path = folder / f"{table}.csv"
        content = path.read_bytes()[: sizes[table]] if path.exists() else b""
        if len(content) < sizes[table]:
            raise ValueError(f"{path} has {len(content)} bytes of the {sizes[table]} that it had")
        kinds = [int if column in _WHOLE else float for column in columns]
        rows[table] = [
            [kind(cell) for kind, cell in zip(kinds, row, strict=True)]
            for row in csv.reader(content.decode().splitlines())
        ]
    return rows


class RowFiles(ExitStack):
    """Context manager around the open files of a run, cut to `sizes` (none given: to nothing)."""

    def __init__(self, folder: Path, sizes: Mapping[str, int] | None = None):
        super().__init__()
        self._files: dict[str, TextIO] = {}
        for table, size in (sizes or dict.fromkeys(TABLES, 0)).items():
            path = folder / f"{table}.csv"
            file = self.enter_context(path.open("a+", encoding="utf-8", newline=""))
            file.truncate(size)
            self._files[table] = file

    def append(self, table: str, row: list) -> None:
        """Write one row."""
        csv.writer(self._files[table], lineterminator="\n").writerow(row)

    def sync(self) -> dict[str, int]:
        """Write all rows to the disk; return the sizes of the files."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {table: file.tell() for table, file in self._files.items()}
