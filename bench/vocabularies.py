"""The text part of the tokenizer study on a large corpus: seconds and memory of every step.

    python -m bench.vocabularies FILE...        # Parquet files with a column `text`

The documents are split 98/1/1 in their order, and the vocabularies of the full scale are trained and measured as the
stage tokenizer-study does it. Only the small models are left out: their budget is a parameter. Needs no torch.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import tokenizers

from bench.machine import describe_processor, warn_if_busy
from gpt2.model.config import ModelShape
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import write_json, write_text
from gpt2.pipeline.params import load, read
from gpt2.pipeline.stage import peak_memory_gib
from gpt2.prepare.corpus import Document, new_corpus
from gpt2.tokenizer.bpe import VocabularyConfig, train_encodings
from gpt2.tokenizer_study.study import TokenizerStudyConfig, count_bytes, read_study_text, study_vocabularies

RESULT, DATA = Path("bench/results/vocabularies.md"), Path("bench/results/vocabularies.json")
SCALE = "full"
# Of a hundred documents, one each.
SPLITS = {0: "val", 1: "test"}


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(1000, columns=["text"]):
                yield from batch["text"].to_pylist()


def measure(files: Sequence[Path]) -> dict:
    """Seconds of each step, and the peak memory."""
    load_before = os.getloadavg()[0]
    values = {**read(), "scale": SCALE}
    config, shape = load("tokenizer_study", TokenizerStudyConfig, values), load("model", ModelShape, values)
    # All of the text.
    vocabulary = VocabularyConfig(train_bytes=2**62)
    seconds = {}
    with TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        with new_corpus(corpus) as writers:
            for i, document in enumerate(read_texts(files)):
                writers[SPLITS.get(i % 100, "train")].add(Document(document, str(i)))
        started = time.perf_counter()
        text = read_study_text(config, vocabulary, corpus)
        seconds["count words"] = time.perf_counter() - started
        trained = train_encodings(text.training, config.vocab_sizes)
        seconds["train all"] = time.perf_counter() - started - seconds["count words"]
        study_vocabularies(text, trained, config, shape)
        seconds["all"] = time.perf_counter() - started
    seconds["measure"] = seconds["all"] - seconds["count words"] - seconds["train all"]
    return {
        "day": date.today().isoformat(), "load": load_before, "processor": describe_processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "tokenizers": tokenizers.__version__, "python": sys.version.split()[0],
        "training_bytes": count_bytes(text.training), "sizes": list(config.vocab_sizes), "seconds": seconds,
        "peak_gib": peak_memory_gib(),
    }  # fmt: skip


def tabulate(data: dict) -> str:
    """The page of a measurement."""
    seconds = data["seconds"]
    lines = [
        f"# Vocabularies of a large corpus\n\n{data['day']}, {data['processor']}, {data['cores']} cores, Python "
        f"{data['python']}, tokenizers {data['tokenizers']}; {data['training_bytes'] / 1e6:,.0f} MB of training text; "
        f"the machine had a load of {data['load']:.1f} before.\n",
        "```\npython -m bench.vocabularies FILE...\n```\n",
        f"The vocabulary of {data['sizes'][-1]:,} tokens is trained; smaller ones are its prefixes.",
    ]
    lines.append(
        f"\nThe stage without its small models took {seconds['all']:,.1f} s: {seconds['count words']:,.1f} to read the "
        f"text and count its words, {seconds['train all']:,.1f} to train it, {seconds['measure']:,.1f} "
        f"to measure them and GPT-2's on held-out text. The largest process had {data['peak_gib']:.2f} GiB."
    )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m bench.vocabularies", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="Parquet files with a column `text`")
    files = parser.parse_args(argv).files
    warn_if_busy()
    data = measure(files)
    write_json(DATA, data)
    write_text(RESULT, tabulate(data))
    print(tabulate(data))


if __name__ == "__main__":
    with reporting("bench.vocabularies"):
        main(sys.argv[1:])
