"""Files of the hub arrive whole and checked, whatever its server does: the real client against a server of ours."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.closure import ROOT
from tests.hub import COMMIT, Fault, Hub, serve

DATASET, LATER = "someone/texts", "f" * 40
NAMES = [f"sample/{number:03d}.parquet" for number in range(4)]
# Opens the files of a dataset and tells their names, sizes and the commit, or the error.
PROBE = """
import json, sys
from gpt2.prepare import hub
from gpt2.pipeline.files import UserError
hub.WAITS, hub.LOG_SECONDS = json.loads(sys.argv[4]), 0.1
try:
    files = hub.open_dataset(*sys.argv[1:4])
    print(json.dumps([files.commit, {name: path.stat().st_size for name, path in files.fetch(1)}]))
except UserError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A repository of four Parquet files of 30 to 60 kB, a small one and two others."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sample").mkdir()
    for number, name in enumerate(NAMES):
        texts = [f"Text {i * (number + 3)} of file {number}, {i * 7919 % 10007}." for i in range(1000 * (number + 2))]
        pq.write_table(pa.table({"text": texts}), folder / name)
    (folder / "sample" / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "README.md").write_text("# Texts\n")
    return folder


@pytest.fixture
def hub(folder) -> Iterator[Hub]:
    with serve(folder, DATASET, "dataset") as hub:
        yield hub


def environment(home: Path, **changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", **changes}


def start(home: Path, hub: Hub, pattern: str = "sample/*", revision: str = "main", waits=(), **changes: str):
    """A process that fetches the files, since the client reads the environment at its import."""
    command = [sys.executable, "-c", PROBE, DATASET, revision, pattern, json.dumps(list(waits))]
    env = environment(home, HF_ENDPOINT=hub.address, **changes)
    return subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(home: Path, hub: Hub, *arguments, **keywords):
    """What the process told."""
    process = start(home, hub, *arguments, **keywords)
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return json.loads(out)


def sizes(folder: Path, *names: str) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def largest_partial(home: Path) -> int:
    try:
        return max((path.stat().st_size for path in (home / "hub").rglob("*.partial")), default=0)
    except FileNotFoundError:
        # It has just become whole.
        return 0


def scraps(home: Path) -> list[str]:
    """Half files, and blobs that are not what their name says."""
    return [path.name for path in (home / "hub").rglob("*") if path.suffix in (".partial", ".incomplete")]


def test_files_of_a_pattern_come_in_order_and_once(folder, tmp_path, hub):
    commit, found = fetch(tmp_path, hub, HF_TOKEN="hf_secret")
    assert commit == COMMIT
    assert found == sizes(folder, *NAMES, "sample/few.jsonl")
    assert list(found) == sorted(found)
    assert scraps(tmp_path) == []
    assert hub.count("GET cdn/*") == len(NAMES)
    # The token goes to the hub, never to the host that it sends us to.
    assert [token for token in hub.tokens if token] == ["Bearer hf_secret"]
    hub.asked.clear()
    assert fetch(tmp_path, hub, revision=COMMIT) == [commit, found]
    assert hub.asked == [], "a commit that is in the cache needs no server"
    assert fetch(tmp_path, hub, revision=COMMIT, HF_HUB_OFFLINE="1") == [commit, found]


def test_one_pattern_may_name_one_file(folder, tmp_path, hub):
    assert fetch(tmp_path, hub, NAMES[2]) == [COMMIT, sizes(folder, NAMES[2])]
    assert hub.count("GET cdn/*") == 1
    assert re.search(r"sample/000\.parquet is not in the cache.*HF_HUB_OFFLINE", fetch(
        tmp_path, hub, revision=COMMIT, HF_HUB_OFFLINE="1"
    ))  # fmt: skip


SLOW_DOWN = {"status": 429, "headers": {"Retry-After": "0"}}


REQUESTS = ["GET api/*/revision/*", "GET api/*/tree/*", "HEAD datasets/*", "GET datasets/*", "GET cdn/*"]


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("fault", [SLOW_DOWN, {"status": 503}], ids=["429", "503"])
def test_a_hub_that_is_busy_is_asked_again(folder, tmp_path, hub, request_, fault):
    hub.faults = [Fault(request_, **fault)]
    started = time.monotonic()
    assert fetch(tmp_path, hub, NAMES[0], waits=[0, 0]) == [COMMIT, sizes(folder, NAMES[0])]
    assert hub.faults == []
    assert time.monotonic() - started < 20


def test_as_long_as_the_hub_says_is_waited(folder, tmp_path, hub):
    hub.faults = [Fault("GET cdn/*", status=429, headers={"Retry-After": "3"})]
    started = time.monotonic()
    assert fetch(tmp_path, hub, NAMES[0]) == [COMMIT, sizes(folder, NAMES[0])]
    assert time.monotonic() - started > 3


@pytest.mark.parametrize("fault", [{"cut": 9000}, {"reset": 9000}, {"longer": 500}, {"longer": -500}])
def test_what_is_missing_of_a_file_is_asked_for(folder, tmp_path, hub, fault):
    hub.faults = [Fault("GET cdn/*", **fault)]
    assert fetch(tmp_path, hub, NAMES[0], waits=[0]) == [COMMIT, sizes(folder, NAMES[0])]
    whole = sizes(folder, NAMES[0])[NAMES[0]]
    assert hub.begins[0] == 0
    expected = {9000: [9000], 500: [], -500: [whole - 500]}[next(iter(fault.values()))]
    assert hub.begins[1:] == expected
    assert scraps(tmp_path) == []


def test_a_connection_that_breaks_again_and_again_is_taken_up_each_time(folder, tmp_path, hub):
    hub.faults = [Fault("GET cdn/*", cut=3000) for _ in range(8)]
    assert fetch(tmp_path, hub, NAMES[1]) == [COMMIT, sizes(folder, NAMES[1])]
    assert hub.begins == [3000 * i for i in range(9)]


def test_other_bytes_than_the_hub_announced_are_fetched_again_and_then_refused(folder, tmp_path, hub):
    hub.faults = [Fault("GET cdn/*", garbage=True)]
    assert fetch(tmp_path, hub, NAMES[0]) == [COMMIT, sizes(folder, NAMES[0])]
    hub.faults = [Fault("GET cdn/*", garbage=True), Fault("GET cdn/*", garbage=True)]
    told = fetch(tmp_path, hub, NAMES[1])
    assert re.search(r"sample/001\.parquet: the bytes that came have the hash .*HF_ENDPOINT, and run again", told)
    assert scraps(tmp_path) == []
    assert fetch(tmp_path, hub, NAMES[1]) == [COMMIT, sizes(folder, NAMES[1])]


def test_a_file_damaged_in_the_cache_is_fetched_again(folder, tmp_path, hub):
    fetch(tmp_path, hub, "sample/*")
    for name in (NAMES[0], "sample/few.jsonl"):
        blob = next((tmp_path / "hub").rglob(f"snapshots/*/{name}")).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    told = fetch(tmp_path, hub, revision=COMMIT, HF_HUB_OFFLINE="1")
    assert "sample/000.parquet is damaged in the cache" in told
    assert fetch(tmp_path, hub, revision=COMMIT) == [COMMIT, sizes(folder, *NAMES, "sample/few.jsonl")]


def test_a_killed_download_goes_on_where_it_was(folder, tmp_path, hub):
    hub.faults = [Fault(f"GET cdn/*{NAMES[1]}", slow=0.1)]
    process = start(tmp_path, hub, "sample/00[01].parquet")
    deadline = time.monotonic() + 60
    while largest_partial(tmp_path) <= 5000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The first file is whole by now, being twice as fast at least.
    while hub.count(f"HEAD datasets/*{NAMES[0]}") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    hub.begins.clear()
    assert fetch(tmp_path, hub, "sample/00[01].parquet") == [COMMIT, sizes(folder, *NAMES[:2])]
    assert len(hub.begins) == 1, "the finished file is not fetched again"
    assert hub.begins[0] >= 5000
    assert scraps(tmp_path) == []


def test_two_at_once_do_not_disturb_each_other(folder, tmp_path, hub):
    hub.faults = [Fault("GET cdn/*", slow=0.01)]
    processes = [start(tmp_path, hub, NAMES[0]) for _ in range(2)]
    told = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert told == [[COMMIT, sizes(folder, NAMES[0])]] * 2
    assert hub.count("GET cdn/*") == 1


def test_a_branch_is_resolved_once(folder, tmp_path, hub):
    """A branch that moves in the middle of a run does not mix two commits."""
    hub.commits[LATER] = folder
    process = start(tmp_path, hub)
    while not hub.count("GET api/*/tree/*"):
        time.sleep(0.01)
    hub.main = LATER
    assert json.loads(process.communicate(timeout=60)[0])[0] == COMMIT
    assert all(COMMIT in request for request in hub.asked if "/resolve/" in request)
    assert fetch(tmp_path, hub)[0] == LATER


@pytest.mark.parametrize(
    ("pattern", "revision", "message"),
    [
        ("sample/*", "v9", r"someone/texts at revision v9 cannot be had .*404.*; mend the revision"),
        ("sample/*", "e" * 40, r"at revision e+ cannot be had .*; mend the revision"),
        ("none/*", "main", r"holds no file none/\*; it has 6 files, such as README\.md, sample/000\.parquet, "),
    ],
)
def test_what_is_not_there_is_named(tmp_path, hub, pattern, revision, message):
    assert re.search(message, fetch(tmp_path, hub, pattern, revision=revision))


def test_an_unknown_repository_and_a_file_that_is_missing_are_named(folder, tmp_path, hub):
    hub.faults = [Fault("HEAD datasets/*", status=404, headers={"X-Error-Code": "EntryNotFound"})]
    assert re.search(r"sample/000\.parquet cannot be had .*the hub lists this file", fetch(tmp_path, hub, NAMES[0]))
    hub.repository = "someone/else"
    told = fetch(tmp_path, hub, revision=LATER)
    assert re.search(r"someone/texts at revision f+ cannot be had .*mend the name, or set HF_TOKEN", told)


def test_a_hub_that_stays_away_is_given_up_with_what_to_do(tmp_path, hub):
    gone = hub.address
    hub.address = "http://127.0.0.1:9"
    told = fetch(tmp_path, hub, waits=[0, 0])
    assert re.search(r"cannot be had from the hub .*HF_ENDPOINT, and run again: finished files", told)
    hub.address = gone
    told = fetch(tmp_path, hub, revision="main", HF_HUB_OFFLINE="1")
    assert re.search(r"cannot be had from the hub .*unset HF_HUB_OFFLINE, or run where the cache", told)
