"""Which documents are kept, and in which split, follows from their texts alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpt2.corpus import SPLITS, read_split
from gpt2.files import UserError
from gpt2.prepare import PrepareConfig, prepare
from tests.settings import HARDWARE

ROOT = Path(__file__).parent.parent
TEXTS = [f"Document number {i} has this text." for i in range(400)]


def config(path=None, **changes) -> PrepareConfig:
    values = {"source": "files", "path": path, "min_chars": 10, "val_percent": 20.0, "test_percent": 10.0}
    return PrepareConfig(**{**values, **changes})


def write_source(folder: Path, *files: list[str | None]) -> Path:
    folder.mkdir()
    for i, texts in enumerate(files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"part_{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def splits(folder: Path) -> dict[str, list[str]]:
    return {split: list(read_split(folder, split)) for split in SPLITS}


def all_texts(folder: Path) -> list[str]:
    return [text for split in SPLITS for text in read_split(folder, split)]


def test_every_document_lands_in_one_split_near_the_percentages_asked(tmp_path):
    figures = prepare(config(write_source(tmp_path / "source", TEXTS)), tmp_path / "corpus", workers=1)
    found = splits(tmp_path / "corpus")
    assert sorted(all_texts(tmp_path / "corpus")) == sorted(TEXTS)
    assert figures["val_percent"] == pytest.approx(20, abs=6)
    assert figures["test_percent"] == pytest.approx(10, abs=5)
    for split in SPLITS:
        assert figures[f"documents_{split}"] == len(found[split])
        assert figures[f"bytes_{split}"] == sum(len(text.encode("utf-8")) for text in found[split])
    assert figures["documents"] == len(TEXTS)
    assert figures["bytes"] == sum(figures[f"bytes_{split}"] for split in SPLITS)


def test_the_split_of_a_text_depends_on_neither_order_nor_company(tmp_path):
    prepare(config(write_source(tmp_path / "a", TEXTS)), tmp_path / "one", workers=1)
    prepare(config(write_source(tmp_path / "b", TEXTS[:150:-1], TEXTS[:100])), tmp_path / "two", workers=1)
    one, two = splits(tmp_path / "one"), splits(tmp_path / "two")
    for split in SPLITS:
        assert set(two[split]) == set(one[split]) & (set(TEXTS[:100]) | set(TEXTS[151:]))


def test_duplicates_empty_and_short_texts_are_dropped_and_counted(tmp_path):
    source = write_source(tmp_path / "source", [*TEXTS, TEXTS[0], "", " \n\t ", None, "short"], TEXTS[:5])
    figures = prepare(config(source), tmp_path / "corpus", workers=1)
    assert (figures["duplicates_dropped"], figures["empty_dropped"], figures["short_dropped"]) == (6, 3, 1)
    assert sorted(all_texts(tmp_path / "corpus")) == sorted(TEXTS)


def test_max_documents_counts_those_kept(tmp_path):
    source = write_source(tmp_path / "source", ["", "short", TEXTS[0], *TEXTS])
    figures = prepare(config(source, max_documents=100), tmp_path / "corpus", workers=1)
    assert figures["documents"] == 100
    assert set(all_texts(tmp_path / "corpus")) == set(TEXTS[:100])


def test_documentation_is_titled_and_the_same_for_any_number_of_workers(tmp_path):
    docs = config(source="docs", packages=("pydantic",), min_chars=40)
    figures = [prepare(docs, tmp_path / f"corpus_{workers}", workers) for workers in (1, 2)]
    assert figures[0] == figures[1]
    assert figures[0]["pydantic_version"].count(".") >= 1
    one, two = ({p.parent.name: p.read_bytes() for p in tmp_path.glob(f"corpus_{w}/*/*")} for w in (1, 2))
    assert one == two
    for text in all_texts(tmp_path / "corpus_1"):
        title, blank, *body = text.split("\n")
        assert title.startswith("pydantic")
        assert blank == ""
        assert len("\n".join(body)) >= 40


def test_an_empty_corpus_is_refused_with_the_reason(tmp_path):
    source = write_source(tmp_path / "source", ["", "short", "brief"])
    with pytest.raises(UserError, match=r"no document is left: 1 are empty and 2 are shorter than .*min_chars=10"):
        prepare(config(source), tmp_path / "corpus", workers=1)
    assert not (tmp_path / "corpus").exists()


def test_a_fault_in_a_late_file_leaves_the_earlier_corpus(tmp_path):
    source = write_source(tmp_path / "source", TEXTS)
    prepare(config(source), tmp_path / "corpus", workers=1)
    before = splits(tmp_path / "corpus")
    (source / "part_9.jsonl").write_bytes(b"not json\n")
    with pytest.raises(UserError, match=r"part_9\.jsonl"):
        prepare(config(source), tmp_path / "corpus", workers=1)
    assert splits(tmp_path / "corpus") == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "corpus"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "docs"}, "source=docs needs packages"),
        ({"source": "files", "path": None}, "source=files needs path"),
        ({"source": "fineweb_edu"}, "source=fineweb_edu needs dataset"),
        ({"val_percent": 60.0, "test_percent": 40.0}, "leave nothing for train"),
        ({"val_percent": 0.0}, "greater than 0"),
        ({"test_percent": 100.0}, "less than 100"),
        ({"min_chars": -1}, "greater than or equal to 0"),
        ({"max_documents": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**{"path": Path("source"), **changes})


def run_stage(folder: Path, section: dict) -> subprocess.CompletedProcess:
    values = {"norm": "preln", "scale": "tiny", "tiny": {"hardware": HARDWARE, "prepare": section}}
    (folder / "params.yaml").write_text(json.dumps(values))
    return subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_stage_writes_corpus_and_metrics(tmp_path):
    write_source(tmp_path / "source", TEXTS)
    section = {"source": "files", "path": "source", "min_chars": 1, "val_percent": 20, "test_percent": 10}
    run = run_stage(tmp_path, section)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
    assert metrics["documents_val"] == len(list(read_split(tmp_path / "data/corpus", "val")))
    assert "seconds" in json.loads((tmp_path / "metrics/speed/prepare.json").read_text())


def test_without_a_network_the_hub_is_refused_with_a_remedy(tmp_path):
    section = {"source": "fineweb_edu", "dataset": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT"}
    run = run_stage(tmp_path, {**section, "min_chars": 1, "val_percent": 1, "test_percent": 1})
    assert run.returncode != 0
    assert "HuggingFaceFW/fineweb-edu" in run.stderr
    assert "set prepare.source to files" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "data/corpus").exists()
