"""Tokenizing: this project with growing numbers of processes next to build-nanogpt's method, on the same text.

    python -m bench.tokenize FILE ... [--workers 1 2 4] [--rounds 3] [--repeat 1]     # Parquet with a column text

The text is first written as the stage prepare writes it, REPEAT times over, since a short text is over before many
processes have started. Then each row reads these files and writes token shards of SHARD_TOKENS to a temporary folder.

build-nanogpt's method is that of its fineweb.py: a multiprocessing pool of half the cores, which imap hands one
document a task, 16 to a message; a task is a list of ids, made an array, checked against 2^16 and cast to uint16; the
parent copies the arrays into shards and writes them with numpy. Here it gets its documents as strings from a
reader of Parquet, not as a dictionary each from the library `datasets`.

The rows take turns, each in a process of its own, and the fastest round counts, since all else that the machine does
can only slow it. The clock starts when the row's process is ready and includes the start of its workers. CPU seconds
are those of the row's process and its workers together, the least of all rounds. Memory is the resident set, looked at
SAMPLES times a second: of the row's process, and of the largest of its workers.

The limit of a row is tiktoken's own: as many processes at once as the row has, each of which calls encode_ordinary on
text that it already has, in turn with the rows. It leaves out reading, the arrays and the shards, and shows what of a
bent line is the machine's, whose cores slow each other down.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import tiktoken

from bench.machine import describe_processor, warn_if_busy
from gpt2.data.shards import TokenSet
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_text
from gpt2.prepare.corpus import SPLITS, Document, new_corpus
from gpt2.tokenizer.encodings import load_encoding
from gpt2.tokenizer.tokenize import tokenize_corpus

RESULTS = Path("bench/results")
# Rows but for this project's, which are called by their number of processes, as are those of BARE behind the name.
BARE, NANOGPT = "tiktoken ", "build-nanogpt"
SHARD_TOKENS = 100_000_000
BARE_BYTES = 20_000_000
SAMPLES = 10
CHUNKSIZE = 16

# What the processes of a pool have from their parent.
_encoding: tiktoken.Encoding
_texts: list[str]


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_texts(folder: Path) -> Iterator[str]:
    """Every document of a corpus in order."""
    for split in SPLITS:
        for file in sorted((folder / split).glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(1000, columns=["text"]):
                yield from batch["text"].to_pylist()


def write_corpus(files: Sequence[Path], folder: Path, repeat: int) -> tuple[int, int]:
    """The text of the files, `repeat` times, as prepare writes it; documents and bytes."""
    with new_corpus(folder) as writers:
        for turn in range(repeat):
            for file in files:
                for batch in pq.ParquetFile(file).iter_batches(1000, columns=["text"]):
                    for text in batch["text"].to_pylist():
                        # One document each is enough for the splits that are held out.
                        empty = [split for split in ("val", "test") if not writers[split].documents]
                        writers[empty[0] if empty else "train"].add(Document(text, f"{turn}"))
    return sum(writer.documents for writer in writers.values()), sum(writer.bytes for writer in writers.values())


def encode_bare(corpus: Path, processes: int) -> float:
    """Bytes per second of tiktoken alone, in `processes` processes at once."""
    global _encoding, _texts
    _encoding, _texts, n_bytes = load_encoding(), [], 0
    for text in read_texts(corpus):
        _texts.append(text)
        n_bytes += len(text.encode())
        if n_bytes > BARE_BYTES:
            break
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        started, ended = zip(*pool.map(encode_texts, range(processes), chunksize=1), strict=True)
    return processes * n_bytes / (max(ended) - min(started))


def encode_texts(_: int) -> tuple[float, float]:
    """When a process of `encode_bare` began and ended."""
    started = time.perf_counter()
    for text in _texts:
        _encoding.encode_ordinary(text)
    return started, time.perf_counter()


def encode_one(text: str) -> np.ndarray:
    """The task of build-nanogpt's pool."""
    tokens = [_encoding.eot_token]
    tokens.extend(_encoding.encode_ordinary(text))
    array = np.array(tokens)
    assert (array >= 0).all() and (array < 2**16).all()
    return array.astype(np.uint16)


def tokenize_one_by_one(corpus: Path, folder: Path) -> int:
    """build-nanogpt's method; returns the number of tokens."""
    global _encoding
    _encoding = load_encoding()
    folder.mkdir()
    shard, filled, n_shards = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    # Forked, as it would be: this process has no threads yet.
    with multiprocessing.get_context("fork").Pool(max(1, count_cores() // 2)) as pool:
        for tokens in pool.imap(encode_one, read_texts(corpus), chunksize=CHUNKSIZE):
            fits = min(len(tokens), SHARD_TOKENS - filled)
            shard[filled : filled + fits] = tokens[:fits]
            filled += fits
            if filled == SHARD_TOKENS:
                np.save(folder / f"{n_shards:06d}", shard)
                n_shards, filled = n_shards + 1, len(tokens) - fits
                shard[:filled] = tokens[fits:]
        np.save(folder / f"{n_shards:06d}", shard[:filled])
    return n_shards * SHARD_TOKENS + filled


def run_row(row: str, corpus: Path, folder: Path) -> dict:
    """One turn of a row in this process: seconds and tokens, or the rate of tiktoken."""
    if row.startswith(BARE):
        return {"bytes_per_s": encode_bare(corpus, int(row.removeprefix(BARE)))}
    started = time.perf_counter()
    if row == NANOGPT:
        n_tokens = tokenize_one_by_one(corpus, folder)
    else:
        tokenize_corpus(corpus, folder, load_encoding(), SHARD_TOKENS, int(row))
        n_tokens = sum(TokenSet(folder, split).n_tokens for split in SPLITS)
    seconds = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": seconds, "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in used), "tokens": n_tokens}


def measure(row: str, corpus: Path) -> dict:
    """One turn of a row in a process of its own, with the largest resident sets seen, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.tokenize", "--row", row, str(corpus), str(Path(folder, "tokens"))]
        peaks = {"parent": 0, "worker": 0}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                with suppress(psutil.Error):
                    peaks["parent"] = max(peaks["parent"], watched.memory_info().rss)
                    for child in watched.children(recursive=True):
                        peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
                time.sleep(1 / SAMPLES)
            assert process.stdout
            printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"bench.tokenize: {row} ended with status {process.returncode}, see its messages above")
    return json.loads(printed) | peaks


def count_processes(row: str, cores: int) -> int:
    """Processes that a row of text works with."""
    return max(1, cores // 2) if row == NANOGPT else int(row)


def tabulate(turns: dict[str, list[dict]], n_bytes: int, cores: int) -> str:
    """The Markdown table: rows by name, each with its rounds, next to those of tiktoken alone."""
    seconds = {row: min(turn["seconds"] for turn in found) for row, found in turns.items() if not row.startswith(BARE)}
    one = seconds.get("1")
    lines = [
        "| | processes | MB/s | tokens/s | ratio to build-nanogpt | ratio to one process | limit, MB/s | of the limit "
        "| CPU seconds | peak memory, parent | worker |",
        "|---|" + "--:|" * 10,
    ]
    for row, fastest in seconds.items():
        processes = count_processes(row, cores)
        limit = max(turn["bytes_per_s"] for turn in turns[f"{BARE}{processes}"])
        parent, worker = (max(turn[of] for turn in turns[row]) / 2**20 for of in ("parent", "worker"))
        name = "build-nanogpt's method" if row == NANOGPT else "this project"
        lines.append(
            f"| {name} | {processes} | {n_bytes / 1e6 / fastest:,.1f} | {turns[row][0]['tokens'] / fastest:,.0f} | "
            f"{seconds[NANOGPT] / fastest:.2f} | {f'{one / fastest:.2f}' if one and row != NANOGPT else '–'} | "
            f"{limit / 1e6:,.1f} | {100 * n_bytes / fastest / limit:.0f} % | "
            f"{min(turn['cpu_s'] for turn in turns[row]):.1f} | {parent:,.0f} MiB | "
            f"{f'{worker:,.0f} MiB' if worker else '–'} |"
        )
    return "\n".join(lines) + "\n\nLimit: tiktoken's encode_ordinary in as many processes at once, over text in memory."


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m bench.tokenize", description=__doc__.splitlines()[0])
    cores = count_cores()
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Parquet with a column text")
    powers = [2**n for n in range(cores.bit_length())]
    parser.add_argument("--workers", nargs="+", type=int, default=powers, help="default: powers of two up to the cores")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=1, help="repeat the text this many times (default: %(default)s)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row:
        print(json.dumps(run_row(options.row, *options.files)))
        return
    if missing := [str(file) for file in options.files if not file.is_file()]:
        raise SystemExit(f"bench.tokenize: {', '.join(missing)} does not exist; name Parquet files")
    warn_if_busy()
    load_before = os.getloadavg()[0]
    rows = [NANOGPT, *map(str, options.workers)]
    rows += [f"{BARE}{n}" for n in sorted({count_processes(row, cores) for row in rows})]
    turns: dict[str, list[dict]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        documents, n_bytes = write_corpus(options.files, corpus, options.repeat)
        for _ in range(options.rounds):
            for row in rows:
                turns[row].append(measure(row, corpus))
                sys.stderr.write(f"{row}: {turns[row][-1]}\n")
    counts = {turn["tokens"] for row in rows if not row.startswith(BARE) for turn in turns[row]}
    assert len(counts) == 1, f"the methods disagree on the number of tokens: {counts}"
    shown = f"--workers {' '.join(map(str, options.workers))} --rounds {options.rounds} --repeat {options.repeat}"
    text = (
        f"# Tokenizing next to build-nanogpt's method\n\n{date.today()}, {describe_processor()}, {cores} cores, load "
        f"{load_before:.1f} before, tiktoken {tiktoken.__version__}; {documents:,} documents, {n_bytes / 1e6:,.1f} MB "
        f"of text, {counts.pop():,} tokens; the fastest of {options.rounds} interleaved rounds.\n\n```\n"
        f"python -m bench.tokenize FILES {shown}\n```\n\n{tabulate(turns, n_bytes, cores)}\n"
    )
    write_text(RESULTS / f"tokenize_{cores}_cores.md", text)
    print(text)


if __name__ == "__main__":
    with reporting("bench.tokenize"):
        main(sys.argv[1:])
