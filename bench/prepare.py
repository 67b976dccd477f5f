"""The stage prepare on Parquet files, and the parts of its work that nobody can leave out.

    python -m bench.prepare FOLDER [--rounds 3]        # a folder of Parquet files with a column text, some 100 MB

Time is that of the processor, of all threads together, so that the rate is one a core; the fastest of ROUNDS counts,
since all else that the machine does can only slow a round. The limit is what remains if each text is read from Parquet,
hashed and written to Parquet once, at the rates of pyarrow and hashlib in the same run, and nothing else takes time.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.machine import describe_processor, warn_if_busy
from gpt2.pipeline.command import Parser
from gpt2.pipeline.files import UserError, write_text
from gpt2.pipeline.stage import peak_memory_gib
from gpt2.prepare.corpus import SCHEMA, SplitWriter
from gpt2.prepare.prepare import PrepareConfig, prepare
from gpt2.prepare.sources import find_files, read_source

RESULT = Path("bench/results/prepare_cpu.md")
STAGE, PARTS = "prepare", ("reading", "SHA-256", "writing")
# Bytes of text a second and core that are asked for.
GOAL = 50e6


def read_texts(folder: Path) -> list[pa.RecordBatch]:
    """All documents of a folder as rows of SCHEMA."""
    return [batch.rows.select(SCHEMA.names) for batch in read_source(find_files(folder), "text", [], [])]


def read_parquet(folder: Path) -> None:
    """What is stored, and no more."""
    for _, path in find_files(folder).files:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(1000, columns=["text"], use_threads=False):
                pass


def hash_texts(batches: Sequence[pa.RecordBatch]) -> None:
    for rows in batches:
        _, offsets, data = rows["text"].buffers()
        view, ends = memoryview(data), np.frombuffer(offsets, np.int32)[: rows.num_rows + 1].tolist()
        for start, end in pairwise(ends):
            hashlib.sha256(view[start:end]).digest()


def write_batches(batches: Sequence[pa.RecordBatch]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder))
        for rows in batches:
            writer.add_batch(rows)
        writer.close()


def time_rounds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of the fastest round of each run; they take turns."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - started)
            sys.stderr.write(f"{name}: {time.process_time() - started:.2f} s\n")
    return seconds


def tabulate(seconds: dict[str, float], n_bytes: int) -> str:
    """A Markdown table of the stage, its parts, and the limit that these make."""
    limit = sum(seconds[part] for part in PARTS)
    lines = ["| | processor seconds | MB/s a core |", "|---|--:|--:|"]
    for name, taken in [*((part, seconds[part]) for part in PARTS), ("limit", limit), (STAGE, seconds[STAGE])]:
        lines.append(f"| {name} | {taken:.2f} | {n_bytes / 1e6 / taken:,.0f} |")
    rate = n_bytes / seconds[STAGE]
    reached = "reached" if rate >= GOAL else "not reached"
    return "\n".join(lines) + (
        f"\n\nThe stage takes {seconds[STAGE] / limit:.2f} times the limit. "
        f"Goal of {GOAL / 1e6:.0f} MB/s a core: {reached}.\n"
    )


def main(argv: Sequence[str]) -> None:
    """Measure, print and write the table."""
    parser = Parser(prog="python -m bench.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Parquet files with a column text")
    parser.add_argument("--rounds", type=int, default=3, metavar="ROUNDS", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    warn_if_busy()
    settings = {"source": "files", "path": arguments.folder, "min_chars": 200, "val_percent": 1.0, "test_percent": 1.0}
    config = PrepareConfig(**settings)
    try:
        with tempfile.TemporaryDirectory() as folder:
            stage = partial(prepare, config, Path(folder, "corpus"), workers=1)
            n_bytes = stage()["bytes"]
            memory = peak_memory_gib()
            batches = read_texts(arguments.folder)
            parts = (
                partial(read_parquet, arguments.folder),
                partial(hash_texts, batches),
                partial(write_batches, batches),
            )
            seconds = time_rounds({STAGE: stage, **dict(zip(PARTS, parts, strict=True))}, arguments.rounds)
    except UserError as error:
        raise SystemExit(f"bench: {error}") from error
    head = (
        f"# Preparing text\n\n{date.today()}, {describe_processor()}, pyarrow {pa.__version__}; "
        f"{n_bytes / 1e6:,.0f} MB of text in {find_files(arguments.folder).n_files} Parquet files; one process, peak "
        f"memory {memory:.2f} GiB; the fastest of {arguments.rounds} rounds.\n\n"
        f"```\npython -m bench.prepare FOLDER --rounds {arguments.rounds}\n```\n\n"
    )
    write_text(RESULT, head + tabulate(seconds, n_bytes))
    sys.stdout.write(head + tabulate(seconds, n_bytes))


if __name__ == "__main__":
    main(sys.argv[1:])
