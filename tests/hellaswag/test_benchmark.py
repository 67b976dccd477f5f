"""Items have HellaSwag's form, whether made from held-out documents or read from a file."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from gpt2.hellaswag.benchmark import (
    MIN_ITEMS,
    WHOLE,
    BenchmarkConfig,
    heldout_items,
    is_prose,
    make_items,
    write_items,
)
from gpt2.hellaswag.items import read_items
from gpt2.pipeline.files import UserError
from gpt2.prepare.corpus import Document, new_corpus
from tests.closure import ROOT
from tests.hub import COMMIT, serve

CONTEXT, ENDING = 6, 4


def word(number: int) -> str:
    """A word of letters that no other number gives."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def make_documents(n: int, n_words: int = 35) -> list[str]:
    """Documents in which every word is unique and lines have five words."""
    texts = []
    for i in range(n):
        words = [word(1000 * i + j) for j in range(n_words)]
        texts.append("\n    ".join(" ".join(words[k : k + 5]) for k in range(0, n_words, 5)))
    return texts


DOCUMENTS = make_documents(200)


def config(**changes) -> BenchmarkConfig:
    values = {"source": "heldout", "items": 300, "context_words": CONTEXT, "ending_words": ENDING, "seed": 1}
    return BenchmarkConfig(**{**values, **changes})


def make_heldout(documents: list[str] = DOCUMENTS, **changes) -> list[dict]:
    return heldout_items(iter(documents), config(**changes))


def document_of(text: str, documents: list[str]) -> int:
    """Index of the document that holds the words of `text` in a row."""
    words = " ".join(text.split())
    (found,) = [i for i, document in enumerate(documents) if words in " ".join(document.split())]
    return found


def test_the_right_ending_continues_the_context_and_the_others_come_from_three_other_documents():
    items = make_heldout(items=100)
    assert [item["ind"] for item in items] == list(range(100))
    for item in items:
        right = item["endings"][item["label"]]
        home = document_of(f"{item['ctx']} {right}", DOCUMENTS)
        homes = [document_of(ending, DOCUMENTS) for ending in item["endings"]]
        assert homes[item["label"]] == home
        assert item["source_id"] == f"test~{home}"
        assert len(set(homes)) == 4
        assert len(item["ctx"].split()) == CONTEXT
        assert [len(ending.split()) for ending in item["endings"]] == [ENDING] * 4
        assert len(set(item["endings"])) == 4


def test_passages_of_a_document_do_not_overlap():
    items = make_heldout(items=10_000)
    assert len(items) == 3 * len(DOCUMENTS)
    words = Counter(w for item in items for w in f"{item['ctx']} {item['endings'][item['label']]}".split())
    assert set(words.values()) == {1}


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_limit_for_each_document_leaves_items_out_and_changes_none(most):
    capped = make_heldout(items=10_000, max_per_document=most)
    assert [item["ind"] for item in capped] == list(range(most * len(DOCUMENTS)))
    assert set(Counter(item["source_id"] for item in capped).values()) == {most}
    every = iter({**item, "ind": None} for item in make_heldout(items=10_000))
    assert all({**item, "ind": None} in every for item in capped)
    assert make_heldout(items=150, max_per_document=most) == capped[:150]


def test_labels_are_uniform():
    counts = np.bincount([item["label"] for item in make_heldout(items=600)])
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert len(counts) == 4
    assert chi_squared < 16.3  # 0.1 % quantile at three degrees of freedom


def test_the_seed_decides_and_nothing_else():
    one = make_heldout()
    np.random.default_rng().random()
    assert make_heldout() == one
    assert make_heldout(seed=2) != one


def test_runs_of_white_space_become_a_line_end_or_a_space():
    for item in make_heldout():
        for text in (item["ctx"], *item["endings"]):
            assert set(re.findall(r"\s+", text)) <= {" ", "\n"}
            assert text == text.strip()
    assert any("\n" in item["ctx"] for item in make_heldout())


def test_equal_endings_are_used_once():
    shared = " ".join(["shared"] * CONTEXT + ["ending"] * ENDING)
    items = make_heldout([*DOCUMENTS, *[shared] * 50], items=10_000)
    assert all(len(set(item["endings"])) == 4 for item in items)
    assert sum("ending" in item["endings"][item["label"]] for item in items) == 1


def test_an_ending_that_is_not_prose_moves_the_passage_on():
    words = DOCUMENTS[0].split()
    words[CONTEXT : CONTEXT + ENDING] = ["[1,", "2,", "3,", "4]"]
    items = make_heldout([" ".join(words), *DOCUMENTS[1:]], items=10_000)
    assert not any("[" in ending for item in items for ending in item["endings"])
    first = [item for item in items if item["ctx"].startswith(words[ENDING] + " ")]
    assert len(first) == 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("plain words in a row", "(some) `marks`, and 1 number.", "half words 12 34"), True),
        (("one 2 3 4", "a list [of] words", "x" * 31, "--- === ---", "so-called under_score"), False),
    ],
)
def test_prose_is_recognised(texts, expected):
    assert [is_prose(text) for text in texts] == [expected] * len(texts)


def test_fewer_passages_than_wanted_give_what_there_is():
    assert len(make_heldout(DOCUMENTS[:40], items=1000)) == 120


@pytest.mark.parametrize(
    ("documents", "changed", "numbers"),
    [
        (DOCUMENTS[:3], {}, "9 passages .* 3 documents"),
        (DOCUMENTS[:40], {"max_per_document": 1}, "40 passages .* 40 documents"),
        (make_documents(3, n_words=900), {}, "from 3 documents"),
    ],
)
def test_too_few_passages_are_refused(documents, changed, numbers):
    with pytest.raises(
        UserError, match=rf"{numbers}.* {MIN_ITEMS} .*prepare\.test_percent.*benchmark\.max_per_document"
    ):
        make_heldout(documents, **changed)


def test_only_the_test_split_is_used(tmp_path):
    with new_corpus(tmp_path / "corpus") as writers:
        for i, text in enumerate(DOCUMENTS):
            writers["test"].add(Document(text, str(i)))
        for split in ("train", "val"):
            writers[split].add(Document("seen in training " * 100, split))
    assert make_items(config(), tmp_path / "corpus") == make_heldout()


ITEM = {
    "ind": 0,
    "activity_label": "Canoeing",
    "ctx_a": "Two women paddle.",
    "ctx_b": "the water",
    "ctx": "Two women paddle. the water",
    "endings": ["is calm.", "is loud.", "sings.", "burns."],
    "label": 0,
}


def write_lines(path, lines):
    data = "".join(f"{line}\n" for line in lines).encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def from_file(path: Path, items: int | None = None) -> list[dict]:
    return make_items(BenchmarkConfig(source="file", path=path, items=items), path.parent)


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_a_file_is_read_whole_or_up_to_the_number_asked_for(tmp_path, name):
    items = [{**ITEM, "ind": i, "label": i % 4, **({"source_id": "a"} if i % 3 else {})} for i in range(20)]
    unknown = {"split": "val", "source_id": ""}
    path = write_lines(tmp_path / name, (json.dumps({**unknown, **item}) for item in items))
    assert from_file(path) == items
    assert list(from_file(path)[0]) == list(ITEM)
    assert from_file(path, items=7) == items[:7]


def test_lines_past_the_number_asked_for_are_checked_too(tmp_path):
    path = write_lines(tmp_path / "items.jsonl", [json.dumps(ITEM)] * 9 + ["{}"])
    with pytest.raises(UserError, match=r"items\.jsonl:10"):
        from_file(path, items=7)


@pytest.mark.parametrize(("n", "asked"), [(9, 10), (WHOLE - 1, WHOLE), (WHOLE + 1, WHOLE)])
def test_fewer_items_than_asked_for_or_another_set_than_hellaswag_are_refused(tmp_path, n, asked):
    path = write_lines(tmp_path / "items.jsonl", [json.dumps(ITEM)] * n)
    with pytest.raises(UserError, match=rf"items\.jsonl holds {n:,} items, not the {asked:,}.* benchmark\.items"):
        from_file(path, items=asked)
    assert len(from_file(path)) == n


# Prints the items of the hub, or the error.
PROBE = """
import json, sys
from pathlib import Path
from gpt2.hellaswag.benchmark import BenchmarkConfig, make_items
from gpt2.pipeline.files import UserError
try:
    print(json.dumps(make_items(BenchmarkConfig.model_validate_json(sys.argv[1]), Path())))
except UserError as error:
    print(json.dumps(str(error)))
"""


def read_hub(home: Path, address: str, **changes) -> list[dict] | str:
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    section = json.dumps({"source": "hub", "revision": COMMIT, **changes})
    ended = subprocess.run([sys.executable, "-c", PROBE, section], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_hub_serves_hellaswag_with_labels_as_strings(tmp_path):
    items = [{**ITEM, "ind": i, "label": i % 4, "source_id": f"wikihow~{i // 2}"} for i in range(20)]
    rows = [{**item, "label": str(item["label"]), "split": "val"} for item in items]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/validation-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data/train-00000-of-00001.parquet")
    with serve(tmp_path, BenchmarkConfig(source="hub").dataset, "dataset") as hub:
        assert read_hub(tmp_path / "home", hub.address) == items
        assert read_hub(tmp_path / "home", hub.address, items=7) == items[:7]
        assert "Rowan/hellaswag holds 20 items, not the 10,042" in read_hub(tmp_path / "home", hub.address, items=WHOLE)
        assert "holds no file data/dev-*" in read_hub(tmp_path / "home", hub.address, files="data/dev-*")
        pq.write_table(pa.table({"ind": [1]}), tmp_path / "data/validation-00000-of-00001.parquet")
        error = read_hub(tmp_path / "other", hub.address)
    assert "Rowan/hellaswag/data/validation-00000-of-00001.parquet:1.activity_label is missing" in error


def test_what_is_written_is_read_back(tmp_path):
    items = make_heldout()
    items[0]["ctx"] = "line\nend and \u2028 separator, ünïcode 漢字"
    write_items(tmp_path / "items.jsonl", items)
    assert list(read_items(tmp_path / "items.jsonl")) == items


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *(("label", value, f"label = {value!r}") for value in (4, -1, "2", True)),
        *(("ind", value, f"ind = {value}") for value in (1.5, -1)),
        ("endings", ["a", "b", "c"], "endings = ['a', 'b', 'c']"),
        ("endings", ["a", "b", "c", " "], "endings.3 = ' ': must not be blank"),
        ("endings", "abcd", "endings = 'abcd'"),
        ("ctx", "  ", "ctx = '  ': must not be blank"),
        ("ctx_b", None, "ctx_b = None"),
        ("source_id", 7, "source_id = 7"),
        *((field, "absent", f"{field} is missing") for field in ITEM),
    ],
)
def test_a_field_that_breaks_the_form_is_named(tmp_path, field, value, named):
    item = {key: given for key, given in {**ITEM, field: value}.items() if given != "absent"}
    path = write_lines(tmp_path / "items.jsonl", map(json.dumps, [ITEM, item]))
    with pytest.raises(UserError, match=re.escape(f"items.jsonl:2.{named}")):
        list(read_items(path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bad.jsonl", b'{"ind": oops}\n'),
        ("bad.jsonl", '{"ctx": "café"}\n'.encode("latin-1")),
        ("bad.jsonl", b"[1, 2]\n"),
        ("bad.jsonl", b"\n"),
        ("bad.jsonl.gz", b"not gzip"),
        ("bad.jsonl.gz", gzip.compress(json.dumps(ITEM).encode())[:-12]),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}:\d"):
        list(read_items(tmp_path / name))


def test_absent_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl does not exist; benchmark\.path"):
        from_file(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"items\.jsonl .*benchmark\.source"):
        write_items(tmp_path / "items.jsonl", from_file(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "items.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "heldout", "items": 5, "context_words": 5}, "source=heldout needs ending_words; set"),
        ({"source": "heldout"}, "needs items, context_words, ending_words"),
        ({"source": "file"}, "source=file needs path"),
        ({"source": "file", "path": "x", "items": 0}, "items\n.*greater than 0"),
        ({"source": "heldout", "max_per_document": 0}, "max_per_document\n.*greater than 0"),
        ({"source": "hub", "revision": "main"}, "revision\n.*should match pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        BenchmarkConfig.model_validate_json(json.dumps(values))
