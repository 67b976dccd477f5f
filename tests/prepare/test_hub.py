"""Files of the hub arrive whole, whatever its server does: the real client against a server on loopback."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.prepare.hub import _LoggedBar
from tests.closure import ROOT
from tests.hub import COMMIT, Fault, Hub, serve

DATASET, LATER = "someone/texts", "f" * 40
NAMES = [f"sample/{number:03d}.parquet" for number in range(4)]
# Opens the files of a data set with each of several arguments and prints commit, names and sizes, or the error.
PROBE = """
import json, sys
from gpt2.prepare import hub
from gpt2.pipeline.files import UserError
hub.WAITS, several = json.loads(sys.argv[1])
found = []
for arguments in several:
    try:
        files = hub.open_dataset(**arguments)
        found.append([files.commit, {name: path.stat().st_size for name, path in files.fetch(1)}])
    except UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""
CARD = """---
configs:
- {config_name: default, data_files: [{split: train, path: "sample/00[0-2].*"}, {split: dev, path: sample/003.parquet}]}
- {config_name: small, data_files: "sample/001.parquet"}
---
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A repository of four Parquet files of 30 to 60 kB, a small one, a card, and a file of another format."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sample").mkdir()
    for number, name in enumerate(NAMES):
        texts = [f"Text {i * (number + 3)} of file {number}, {i * 7919 % 10007}." for i in range(1000 * (number + 2))]
        pq.write_table(pa.table({"text": texts}), folder / name)
    (folder / "sample" / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "sample" / "table.csv").write_text("text\none\n")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def hub(folder) -> Iterator[Hub]:
    with serve(folder, DATASET, "dataset") as hub:
        yield hub


def start(home: Path, hub: Hub, *several: dict, waits=(), **environment: str) -> subprocess.Popen:
    """A process that fetches files, since the client reads the environment at its import."""
    usual = {"dataset": DATASET, "revision": "main", "endings": [".parquet", ".jsonl"]}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PROBE, json.dumps([waits, [{**usual, **arguments} for arguments in several]])]
    return subprocess.Popen(command, cwd=home, env={**kept, **own, **environment}, stdout=-1, stderr=-1, text=True)


def fetch(home: Path, hub: Hub, *several: dict, **options) -> list:
    """What the process printed for each of several arguments."""
    process = start(home, hub, *several, **options)
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return json.loads(out)


def sizes(folder: Path, *names: str) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


PARQUET = {"pattern": "sample/*.parquet"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def test_files_of_a_pattern_come_in_order_and_once(folder, tmp_path, hub):
    some = {"pattern": "sample/[0f]*"}
    ((commit, found),) = fetch(tmp_path, hub, some, HF_TOKEN="hf_secret")
    assert commit == COMMIT
    assert list(found.items()) == list(sizes(folder, *NAMES, "sample/few.jsonl").items())
    assert hub.count("GET cdn/*") == len(NAMES)
    # The token goes to the hub, never to the host that it sends us to.
    assert [token for token in hub.tokens if token] == ["Bearer hf_secret"]
    hub.asked.clear()
    assert fetch(tmp_path, hub, {**some, "revision": COMMIT}) == [[commit, found]]
    assert hub.asked == [], "a commit that is in the cache needs no server"
    again, other = fetch(tmp_path, hub, some, {"pattern": "sample/table.csv"}, **OFFLINE)
    assert again == [commit, found]
    assert re.search(r"sample/table\.csv cannot be read .*HF_HUB_OFFLINE", other)


def test_config_and_split_follow_the_card_also_offline(folder, tmp_path, hub):
    chosen = [{}, {"split": "dev"}, {"config": "small"}]
    expected = [[COMMIT, sizes(folder, *names)] for names in (NAMES[:3], NAMES[3:], NAMES[1:2])]
    assert fetch(tmp_path, hub, *chosen) == expected
    assert fetch(tmp_path, hub, *chosen, **OFFLINE) == expected


def test_without_a_card_config_and_split_follow_the_names(tmp_path):
    repository = tmp_path / "repository"
    names = [f"data/{part}.jsonl" for part in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")]
    for name in names:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text('{"text": "one"}\n')
    with serve(repository, DATASET, "dataset") as hub:
        train, other = fetch(tmp_path, hub, {}, {"split": "validation"})
    assert train == [COMMIT, sizes(repository, *names[1:])]
    assert "no split validation, but train, test" in other


REQUESTS = ["GET api/*/revision/*", "GET api/*/tree/*", "HEAD datasets/*", "GET datasets/*", "GET cdn/*"]


@pytest.mark.parametrize("fault", [{"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503}, {"cut": 9000},
                                   {"reset": 9000}, {"short": 500}], ids=str)  # fmt: skip
def test_what_fails_once_is_asked_again(folder, tmp_path, hub, fault):
    hub.faults = [Fault(request, **fault) for request in (REQUESTS if "status" in fault else REQUESTS[-1:])]
    assert fetch(tmp_path, hub, {}, waits=[0, 0, 0]) == [[COMMIT, sizes(folder, *NAMES[:3])]]
    assert hub.faults == []


def test_a_branch_is_resolved_once(folder, tmp_path, hub):
    """A branch that moves in the middle of a run does not mix two commits."""
    hub.commits[LATER] = folder
    process = start(tmp_path, hub, PARQUET)
    while not hub.count("GET api/*/tree/*"):
        time.sleep(0.01)
    hub.main = LATER
    assert json.loads(process.communicate(timeout=60)[0])[0][0] == COMMIT
    assert all(COMMIT in request for request in hub.asked if "/resolve/" in request)
    assert fetch(tmp_path, hub, PARQUET)[0][0] == LATER


def test_progress_is_logged_until_the_file_is_not_needed_any_more(caplog):
    caplog.set_level("INFO")
    stop = Event()
    with _LoggedBar(stop, total=2000, desc="sample/000.parquet", unit="B") as bar:
        bar.update(2000)
        stop.set()
        with pytest.raises(CancelledError):
            bar.update(1)
    assert re.search(r"sample/000\.parquet.* 0/2000 ", caplog.messages[0])
    assert re.search(r"sample/000\.parquet.*100%.* 2000/2000 ", caplog.messages[-1])


def test_what_is_missing_is_named(tmp_path, hub):
    cases = [
        ({"revision": "v9"}, r"someone/texts at revision v9 cannot be read .*404.*; correct .*revision"),
        ({"revision": "e" * 40}, r"at revision e+ cannot be read .*; correct .*revision"),
        ({"dataset": "someone/else"}, r"someone/else at .* cannot be read .*; correct .*HF_TOKEN"),
        ({"pattern": "none/*"}, r"holds no file none/\*; it has 7 files, such as README\.md, sample/000\.parquet, "),
        ({"config": "large"}, r"config large cannot be read .*'default', 'small'"),
        ({"split": "test"}, r"has no split test, but train, dev"),
        ({"endings": [".txt"]}, r"no file \*\.txt is found"),
    ]
    for (_, message), found in zip(cases, fetch(tmp_path, hub, *(case for case, _ in cases)), strict=True):
        assert re.search(message, found)
    (error,) = fetch(tmp_path, hub, {"revision": "v9"}, **OFFLINE)
    assert re.search(r"cannot be read from the hub .*unset HF_HUB_OFFLINE", error)


def test_a_hub_that_stays_away_is_given_up_with_a_remedy(tmp_path, hub):
    hub.address = "http://127.0.0.1:9"
    (error,) = fetch(tmp_path, hub, PARQUET, waits=[0])
    assert re.search(r"cannot be read from the hub .*HF_ENDPOINT, and run again: finished files", error)
