"""What a worker of `tokenize` does; it imports little, since each of them has to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from gpt2.data.shards import Piece
from gpt2.pipeline.files import UserError

# Documents turned into Python strings at a time.
BATCH = 256
REMEDY = "run `dvc repro -f prepare`"


@dataclass(frozen=True)
class RowGroup:
    """What one worker encodes at a time: a row group of a Parquet file, its documents and bytes (before packing)."""

    file: Path
    number: int
    documents: int
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.file}, row group {self.number}"


def encode_group(encoding: tiktoken.Encoding, group: RowGroup) -> Piece:
    """The token ids of a row group. Raises UserError if it cannot be read."""
    separator = np.array([encoding.eot_token], dtype=np.uint32)
    parts: list[np.ndarray] = []
    n_bytes = 0
    try:
        with pq.ParquetFile(group.file) as table:
            batches = table.iter_batches(BATCH, row_groups=[group.number], columns=["text"], use_threads=False)
            for text in (text for batch in batches for text in batch["text"].to_pylist()):
                n_bytes += len(text.encode())
                # No special token is allowed, so the text of one is text; a buffer of ids costs less than a list.
                parts += (separator, encoding.encode_to_numpy(text, disallowed_special=()))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{group} cannot be read ({error}); {REMEDY}") from error
    ids = np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, dtype=np.uint16)
    return Piece(ids, len(parts) // 2, n_bytes)
