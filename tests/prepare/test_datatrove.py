"""What datatrove writes by the example of the docs is a corpus that `prepare` reads."""

import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.prepare.corpus import SPLITS, read_split
from gpt2.prepare.prepare import PrepareConfig, prepare
from tests.closure import ROOT

PYTHON = os.environ.get("DATATROVE_PYTHON", sys.executable)
STOP_WORDS = ["the", "of", "and", "to", "that", "with"]


@pytest.fixture(scope="module", autouse=True)
def datatrove() -> None:
    found = subprocess.run([PYTHON, "-c", "import datatrove, spacy, nltk"], capture_output=True).returncode == 0
    if not found:
        pytest.skip("datatrove is not installed; see docs/datatrove.md")


def make_text(rng: random.Random) -> str:
    """Prose enough for the filters: 100 words, all but the stop words different."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(100)]
    words[::8] = [rng.choice(STOP_WORDS) for _ in words[::8]]
    return " ".join(words).capitalize() + "."


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_example_gives_files_that_prepare_reads(tmp_path, tasks):
    rng = random.Random(1)
    good = [make_text(rng) for _ in range(300)]
    (tmp_path / "raw").mkdir()
    for number in range(3):
        texts = [*good[number::3], "The same words of the line. " * 40, "1 2 3 " * 100]
        columns = {"text": texts, "id": [f"{number}-{i}" for i in range(len(texts))], "score": [3.0] * len(texts)}
        pq.write_table(pa.table(columns), tmp_path / "raw" / f"{number}.parquet")
    command = [PYTHON, str(ROOT / "docs/clean_corpus.py"), "raw", "clean", str(tasks)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    settings = {"source": "files", "path": tmp_path / "clean", "min_chars": 200, "min_score": 2.5}
    figures = prepare(PrepareConfig(**settings, val_percent=10.0, test_percent=10.0), tmp_path / "corpus", workers=1)
    assert figures["documents"] == len(good)
    found = {split: set(read_split(tmp_path / "corpus", split)) for split in SPLITS}
    assert set.union(*found.values()) == set(good)
    rows = pq.read_table(tmp_path / "corpus" / "val").to_pylist()
    assert all(good[3 * int(row["id"].split("-")[1]) + int(row["id"][0])] == row["text"] for row in rows)
