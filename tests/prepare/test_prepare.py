"""Which documents are kept, and in which split, follows from their texts alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from gpt2.pipeline.files import UserError
from gpt2.prepare.corpus import SPLITS, read_split
from gpt2.prepare.prepare import PrepareConfig, prepare
from tests.closure import ROOT
from tests.hub import COMMIT, Fault, serve
from tests.settings import HARDWARE

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


@pytest.mark.parametrize(
    ("limit", "n_kept"),
    [
        ({"max_documents": 100}, 100),
        ({"max_bytes": sum(map(len, TEXTS[:100]))}, 100),
        ({"max_bytes": sum(map(len, TEXTS[:100])) - 1}, 99),
        ({"max_bytes": sum(map(len, TEXTS[:100])) + 1}, 100),
        ({"max_bytes": 10**9}, len(TEXTS)),
    ],
)
def test_a_slice_takes_documents_in_order_while_they_fit(tmp_path, limit, n_kept):
    source = write_source(tmp_path / "source", ["", "short", TEXTS[0], *TEXTS, "", "short"])
    figures = prepare(config(source, **limit), tmp_path / "corpus", workers=1)
    assert figures["documents"] == n_kept
    assert set(all_texts(tmp_path / "corpus")) == set(TEXTS[:n_kept])
    assert figures["bytes"] <= limit.get("max_bytes", figures["bytes"])
    # What follows the last is not counted.
    n_faults = 1 if n_kept < len(TEXTS) else 2
    dropped = (figures["duplicates_dropped"], figures["empty_dropped"], figures["short_dropped"])
    assert dropped == (1, n_faults, n_faults)


def test_a_slice_ends_before_files_that_it_does_not_need(tmp_path):
    source = write_source(tmp_path / "source", TEXTS[:200], TEXTS[200:])
    (source / "part_2.jsonl").write_bytes(b"not json\n")
    for limit in ({"max_documents": 400}, {"max_bytes": sum(map(len, TEXTS))}):
        prepare(config(source, **limit), tmp_path / "corpus", workers=1)
        assert sorted(all_texts(tmp_path / "corpus")) == sorted(TEXTS)


COLUMNS = {
    "language": lambda i: None if i % 10 == 0 else "de" if i % 3 == 0 else "en",
    "language_score": lambda i: i / 400,
    "score": lambda i: float("nan") if i == 7 else i % 5 + 0.5,
}


def test_filters_drop_by_column_and_count_the_first_reason(tmp_path):
    columns = {name: [value(i) for i in range(400)] for name, value in COLUMNS.items()}
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"text": ["", *TEXTS[1:]], **columns}), tmp_path / "source" / "a.parquet")
    filters = {"language": "en", "min_language_score": 0.5, "min_score": 2.5}
    figures = prepare(config(tmp_path / "source", **filters), tmp_path / "corpus", workers=1)
    english = {i for i in range(1, 400) if i % 10 and i % 3}
    sure = {i for i in english if i >= 200}
    good = {i for i in sure if i % 5 >= 2}
    assert set(all_texts(tmp_path / "corpus")) == {TEXTS[i] for i in good}
    assert figures["empty_dropped"] == 1
    assert figures["language_dropped"] == 399 - len(english)
    assert figures["min_language_score_dropped"] == len(english) - len(sure)
    assert figures["min_score_dropped"] == len(sure) - len(good)
    figures = prepare(config(tmp_path / "source", min_score=0.0), tmp_path / "corpus", workers=1)
    # NaN is no score. Filters that are not set leave no count.
    assert figures["min_score_dropped"] == 1
    assert "language_dropped" not in figures


def test_more_documents_than_a_batch_in_many_files_are_the_same_in_one(tmp_path):
    texts = [f"Document {i * 7919 % 5003} of many." for i in range(8000)]
    prepare(config(write_source(tmp_path / "a", texts)), tmp_path / "one", workers=1)
    files = [texts[:1], texts[1:2500], texts[2500:2501], texts[2501:]]
    prepare(config(write_source(tmp_path / "b", *files)), tmp_path / "many", workers=2)
    assert splits(tmp_path / "one") == splits(tmp_path / "many")
    assert len(all_texts(tmp_path / "one")) == 5003


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
        ({"source": "hub", "dataset": "a/b"}, "source=hub needs revision"),
        (
            {"source": "hub", "dataset": "a/b", "revision": "main", "files": "*", "config": "b"},
            r"files=\* and config=b",
        ),
        ({"source": "docs", "packages": ("numpy",), "min_score": 3.0}, "source=docs has no column for min_score"),
        ({"max_bytes": 0}, "greater than 0"),
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


def run_stage(folder: Path, section: dict, **environment: str) -> subprocess.CompletedProcess:
    write_params(folder, section)
    env = environ(folder, **environment)
    command = [sys.executable, "-m", "stages.prepare"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def write_params(folder: Path, section: dict) -> None:
    values = {"norm": "preln", "scale": "tiny", "tiny": {"hardware": HARDWARE, "prepare": section}}
    (folder / "params.yaml").write_text(json.dumps(values))


def environ(folder: Path, **changes: str) -> dict[str, str]:
    """Without a network, unless `changes` allow it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **changes,
    }


LIMITS = {"min_chars": 1, "val_percent": 20, "test_percent": 10}


def test_the_stage_writes_corpus_and_metrics(tmp_path):
    write_source(tmp_path / "source", TEXTS)
    run = run_stage(tmp_path, {"source": "files", "path": "source", **LIMITS})
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
    assert metrics["documents_val"] == len(list(read_split(tmp_path / "data/corpus", "val")))
    assert "seconds" in json.loads((tmp_path / "metrics/speed/prepare.json").read_text())


def test_progress_is_logged_with_rate_files_and_time_left(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gpt2.prepare.prepare.LOG_SECONDS", -1)
    caplog.set_level("INFO")
    prepare(config(write_source(tmp_path / "source", TEXTS[:200], TEXTS[200:])), tmp_path / "corpus", workers=1)
    line = r"0 MB of text, \d+\.\d MB/s, file {} of 2, .+ s left if all is read"
    assert [bool(re.fullmatch(line.format(i), text)) for i, text in enumerate(caplog.messages, start=1)] == [True, True]


# --- bounded memory

# Prints the bytes of the corpus, and the most that Arrow held at once: the peak of a process would begin with that of
# the one that started it.
MEMORY = """
from pathlib import Path
import pyarrow
from gpt2.prepare.prepare import PrepareConfig, prepare
config = PrepareConfig(source="files", path=Path("source"), min_chars=1, val_percent=20.0, test_percent=20.0)
print(prepare(config, Path("corpus"), 1)["bytes"], pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize(
    ("document_bytes", "most", "written"),
    [(500, 50e6, {}), (1_000_000, 300e6, {"write_batch_size": 1, "use_dictionary": False})],
)
def test_memory_does_not_grow_with_a_row_group_of_200_mb(tmp_path, document_bytes, most, written):
    letters = np.random.default_rng(1).integers(97, 123, 200_000_000, dtype=np.uint8).tobytes()
    ends = range(document_bytes, len(letters) + 1, document_bytes)
    texts = pa.array([letters[end - document_bytes : end] for end in ends], pa.binary()).cast(pa.string())
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "source/one.parquet", row_group_size=len(texts), **written)
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, cwd=tmp_path, env=environ(tmp_path), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    n_bytes, held = map(int, run.stdout.split())
    assert n_bytes == len(letters)
    assert held < most


# --- the hub

HUB = {"source": "hub", "dataset": "someone/edu", "revision": "main", **LIMITS}
LATER = "f" * 40


def write_dataset(folder: Path, texts: list[str] = TEXTS, n_files: int = 4) -> Path:
    """A repository like FineWeb-Edu's."""
    (folder / "sample").mkdir(parents=True)
    for number in range(n_files):
        some = texts[number::n_files]
        columns = {"text": some, "id": [f"<urn:{text}>" for text in some], "score": [3.0] * len(some)}
        pq.write_table(pa.table(columns), folder / "sample" / f"{number:03d}_00000.parquet")
    return folder


def corpus_of(folder: Path) -> dict[str, bytes]:
    files = (folder / "data/corpus").rglob("*.parquet")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_dataset_of_the_hub_gives_the_corpus_of_its_files_also_offline_and_as_a_mirror(tmp_path):
    source = write_dataset(tmp_path / "repository")
    run = run_stage(tmp_path, HUB)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.search(r"someone/edu at revision main cannot be read .*; unset HF_HUB_OFFLINE", run.stderr)
    assert not (tmp_path / "data/corpus").exists()
    with serve(source, "someone/edu", "dataset") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        run = run_stage(tmp_path, HUB, **online)
        assert run.returncode == 0, run.stderr
        expected = corpus_of(tmp_path)
        metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
        assert (metrics["dataset"], metrics["revision"], metrics["documents"]) == ("someone/edu", COMMIT, len(TEXTS))
        # Other parameters: nothing is fetched again.
        assert run_stage(tmp_path, {**HUB, "min_chars": 30}, **online).returncode == 0
        assert hub.count("GET cdn/*") == 4
    for section in (
        {**HUB, "revision": COMMIT},
        {**HUB, "source": "fineweb_edu", "files": "sample/*.parquet"},
        {"source": "files", "path": "repository/sample", **LIMITS},
    ):
        shutil.rmtree(tmp_path / "data/corpus")
        run = run_stage(tmp_path, section)
        assert run.returncode == 0, run.stderr
        assert corpus_of(tmp_path) == expected


def test_a_slice_fetches_no_more_files_than_it_needs(tmp_path):
    with serve(write_dataset(tmp_path / "repository"), "someone/edu", "dataset") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        for slice_ in ({"max_documents": 150}, {"max_bytes": 150 * len(TEXTS[0])}):
            assert run_stage(tmp_path, {**HUB, **slice_}, **online).returncode == 0
            assert hub.count("GET cdn/*") == 2


@pytest.mark.parametrize("record", ["metrics", "git"])
def test_a_branch_that_moved_is_refused_until_a_commit_is_named(tmp_path, record):
    one, other = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "other", TEXTS[:300])
    folder = tmp_path / "project"
    folder.mkdir()
    with serve(one, "someone/edu", "dataset") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        assert run_stage(folder, HUB, **online).returncode == 0
        before = corpus_of(folder)
        if record == "git":
            for command in ("init -q", "add metrics", "-c user.name=x -c user.email=x commit -qm run"):
                subprocess.run(["git", *command.split()], cwd=folder, check=True)
            # As DVC does before it runs a stage.
            (folder / "metrics/prepare.json").unlink()
        hub.commits[LATER] = other
        hub.main = LATER
        run = run_stage(folder, HUB, **online)
        message = rf"revision=main of someone/edu was {COMMIT} in the last run and is {LATER} now; set it to the one"
        assert run.returncode != 0 and re.search(message, run.stderr)
        assert corpus_of(folder) == before
        for commit, n_documents in ((COMMIT, 400), (LATER, 300)):
            assert run_stage(folder, {**HUB, "revision": commit}, **online).returncode == 0
            metrics = json.loads((folder / "metrics/prepare.json").read_text())
            assert (metrics["revision"], metrics["documents"]) == (commit, n_documents)


def test_files_of_another_format_are_refused_with_where_parquet_is(tmp_path):
    source = write_dataset(tmp_path / "repository")
    (source / "sample/a.csv").write_text("text\n")
    with serve(source, "someone/edu", "dataset") as hub:
        section = {**HUB, "files": "sample/*"}
        run = run_stage(tmp_path, section, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.address)
    assert re.search(r"matches sample/a\.csv .*prepare\.revision=refs/convert/parquet", run.stderr)


# --- what may happen


# As the stage, but without waiting before a retry.
PATIENT = [
    sys.executable,
    "-c",
    "from gpt2.prepare import hub; hub.WAITS = (0,) * 9; from stages.prepare import main; main()",
]


def test_a_server_that_cuts_refuses_and_truncates_and_kills_in_between_change_nothing(tmp_path):
    texts = [f"Text {i} is {i * 7919 % 10007}, {'and so on ' * (i % 40)}." for i in range(20_000)]
    source = write_dataset(tmp_path / "repository", texts)
    (whole := tmp_path / "whole").mkdir()
    (killed := tmp_path / "killed").mkdir()
    busy = {"status": 429, "headers": {"Retry-After": "0"}}
    kinds = [busy, {"status": 503}, {"cut": 30_000}, {"reset": 30_000}, {"short": 500}, {"slow": 0.002}]
    with serve(source, "someone/edu", "dataset") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        started = time.monotonic()
        assert run_stage(whole, HUB, **online).returncode == 0
        seconds = time.monotonic() - started
        write_params(killed, HUB)
        rng = np.random.default_rng()
        for _ in range(5):
            hub.faults = [Fault("GET cdn/*", **kind) for kind in rng.permutation(kinds)]
            process = subprocess.Popen(PATIENT, cwd=killed, env=environ(killed, **online), stderr=-1)
            time.sleep(rng.uniform(0.2, 1.1) * seconds)
            process.kill()
            process.communicate()
        hub.faults = [Fault(request, **busy) for request in ("GET api/*", "HEAD *", "GET datasets/*")]
        hub.faults += [Fault("GET cdn/*", **kind) for kind in kinds]
        run = subprocess.run(PATIENT, cwd=killed, env=environ(killed, **online), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert corpus_of(killed) == corpus_of(whole)
    for name in ("metrics/prepare.json", "params.yaml"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in (killed / "data").iterdir()] == ["corpus"]


def test_a_full_disk_is_named_and_the_next_run_succeeds(tmp_path):
    source = write_dataset(tmp_path / "repository", [f"{i} {i * 7919 % 10007} {i * i}" for i in range(20_000)])
    largest = max(file.stat().st_size for file in source.rglob("*.parquet"))
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (%d, -1)); from stages.prepare import main; main()"
    )
    with serve(source, "someone/edu", "dataset") as hub:
        write_params(tmp_path, HUB)
        env = environ(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.address)
        errors = []
        for room in (largest // 2, largest + 1000):
            command = [sys.executable, "-c", limited % room]
            run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            assert run.returncode == 1 and "Traceback" not in run.stderr
            assert not (tmp_path / "data/corpus").exists() and not (tmp_path / "data/.corpus.tmp").exists()
            errors.append(run.stderr)
        assert re.search(r"sample/\w+\.parquet cannot be read from the hub .*File too large.*HF_HOME", errors[0])
        assert re.search(r"data/\.corpus\.tmp/train cannot be written .*make room and run dvc repro again", errors[1])
        hub.asked.clear()
        assert run_stage(tmp_path, HUB, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.address).returncode == 0
        assert hub.count("GET cdn/*") == 0, "finished downloads are not lost"
