"""Folders of Parquet, JSON lines and text files are read in order, without a network, and their faults are named."""

import json
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.pipeline.files import UserError
from gpt2.prepare import sources
from gpt2.prepare.sources import BATCH_DOCUMENTS, find_files, read_source


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to connect fails the test."""

    def refuse(*_):
        raise AssertionError("a local folder must be read without a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def read(folder, text_column="text", numbers=(), strings=()):
    """The rows of a folder, as dicts."""
    batches = list(read_source(find_files(folder), text_column, numbers, strings))
    assert sum(batch.n_bytes for batch in batches) == pytest.approx(find_files(folder).n_bytes)
    return [row for batch in batches for row in batch.rows.to_pylist()]


def texts(folder, text_column="text"):
    return [row["text"] for row in read(folder, text_column)]


def packed(path, data: bytes) -> bytes:
    """`data` compressed as the ending of `path` says."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return pa.compress(data, codec, asbytes=True) if codec else data


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8")))


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_all_formats_are_read_in_order_of_relative_names(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "third"}, {"text": "fourth"}])
    write_parquet(tmp_path / "b" / "x.parquet", {"text": ["second"], "id": ["own id"], "url": ["u"]})
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "first ünïcode", "id": 7}])
    (tmp_path / "README.md").write_text("not data")
    assert [(row["text"], row["id"]) for row in read(tmp_path)] == [
        ("first ünïcode", "7"),
        ("second", "own id"),
        ("third", "c.jsonl:1"),
        ("fourth", "c.jsonl:2"),
    ]


@pytest.mark.parametrize(
    "name", [f"a{kind}{packing}" for kind in (".jsonl", ".json") for packing in ("", ".gz", ".zst")]
)
def test_json_lines_are_read_under_each_name_and_packing(tmp_path, name):
    write_jsonl(tmp_path / name, [{"text": f"ünïcode {i}"} for i in range(2500)])
    assert texts(tmp_path) == [f"ünïcode {i}" for i in range(2500)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    content = "First line, ünïcode.\r\n\nSecond.\n"
    (tmp_path / name).write_bytes(packed(tmp_path / name, content.encode("utf-8")))
    assert read(tmp_path, "body") == [{"text": content, "id": f"{name}:1"}]


def test_a_batch_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    monkeypatch.setattr(sources, "PARQUET_BYTES", 500)
    rows = {"text": [str(i) * 100 for i in range(90)], "id": [str(i) for i in range(90)]}
    write_parquet(tmp_path / "a.parquet", rows)
    write_jsonl(tmp_path / "b.jsonl", pa.table(rows).to_pylist())
    batches = list(read_source(find_files(tmp_path), "text", [], []))
    assert [row for batch in batches for row in batch.rows.to_pylist()] == 2 * pa.table(rows).to_pylist()
    assert max(batch.rows.nbytes for batch in batches) < 4000


def test_names_are_not_patterns(tmp_path):
    write_jsonl(tmp_path / "[ab] * 100%" / "a?.jsonl", [{"text": "odd"}])
    write_jsonl(tmp_path / "[ab] * 100%" / "ab.jsonl", [{"text": "plain"}])
    assert texts(tmp_path) == ["odd", "plain"]


def test_more_rows_than_a_batch_arrive_whole_and_numbered(tmp_path):
    n = 2 * BATCH_DOCUMENTS + 1
    write_parquet(tmp_path / "many.parquet", {"text": [f"text {i}" for i in range(n)]})
    rows = read(tmp_path)
    assert [row["text"] for row in rows] == [f"text {i}" for i in range(n)]
    assert rows[-1]["id"] == f"many.parquet:{n}"


def test_null_texts_are_empty_and_another_column_can_be_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "kept"}, {"body": None}, {"other": 1}])
    assert texts(tmp_path, "body") == ["kept", "", ""]


def test_blank_lines_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n \n{"text": "two"}')
    assert [row["id"] for row in read(tmp_path)] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.string()])
def test_every_kind_of_strings_is_read(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", {"text": pa.array(["ünïcode", None], kind), "id": pa.array(["1", "2"], kind)})
    assert texts(tmp_path) == ["ünïcode", ""]


def test_other_columns_come_along_where_they_are_asked_for(tmp_path):
    columns = {"text": ["a", "b"], "language": ["en", None], "score": [1, 3], "url": ["x", "y"]}
    write_parquet(tmp_path / "a.parquet", columns)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "c", "score": 2.5, "language": "de"}, {"text": "d"}])
    rows = read(tmp_path, numbers=["score"], strings=["language"])
    assert [row["score"] for row in rows] == [1.0, 3.0, 2.5, None]
    assert [row["language"] for row in rows] == ["en", None, "de", None]
    assert rows[0].keys() == {"text", "id", "score", "language"}


def test_a_column_that_is_asked_for_and_missing_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    with pytest.raises(UserError, match=r"a\.parquet lacks score, its columns are text; drop that filter"):
        read(tmp_path, numbers=["score"])


def test_a_missing_column_is_named_with_those_found(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "url": ["y"]})
    with pytest.raises(UserError, match=r"a\.parquet lacks prepare\.text_column = 'text' among its columns body, url"):
        read(tmp_path)


def test_a_column_of_numbers_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": 1}, {"text": 2}])
    with pytest.raises(UserError, match=r"a\.jsonl has in prepare\.text_column = 'text' values of int64, not strings"):
        read(tmp_path)


def latin_1(path):
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))


def not_json(path):
    path.write_bytes(b'{"text": "fine"}\n{"text": oops}\n')


def cut_in_half(path):
    if path.suffix == ".parquet":
        write_parquet(path, {"text": ["text"] * 1000})
    else:
        write_jsonl(path, [{"text": f"text {i}"} for i in range(1000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def flipped_bytes(path):
    write_jsonl(path, [{"text": f"text {i * i}"} for i in range(1000)])
    damaged = bytearray(path.read_bytes())
    damaged[200:300] = bytes(100)
    path.write_bytes(damaged)


def damaged_page(path):
    write_parquet(path, {"text": [f"text {i * i}" for i in range(10000)]})
    damaged = bytearray(path.read_bytes())
    damaged[100:5000] = b"\xff" * 4900
    path.write_bytes(damaged)


def broken_utf8(path):
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    write_parquet(path, {"text": column})


def no_gzip(path):
    path.write_bytes(b"plain text")


def no_rows(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (latin_1, "bad.jsonl"),
        (latin_1, "bad.txt"),
        (not_json, "bad.jsonl"),
        (cut_in_half, "bad.jsonl.gz"),
        (cut_in_half, "bad.jsonl.zst"),
        (cut_in_half, "bad.parquet"),
        (flipped_bytes, "bad.jsonl.gz"),
        (damaged_page, "bad.parquet"),
        (broken_utf8, "bad.parquet"),
        (no_gzip, "bad.jsonl.gz"),
        (no_rows, "bad.jsonl"),
        (no_rows, "bad.parquet"),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, damage, name):
    write_jsonl(tmp_path / "a_good.jsonl", [{"text": "good"}])
    damage(tmp_path / name)
    with pytest.raises(UserError, match=rf"(?s){name}.*remove it"):
        read(tmp_path)


def test_an_absent_folder_and_one_without_data_are_named(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.path = .*absent.* is not a folder"):
        find_files(tmp_path / "absent")
    (tmp_path / "notes.csv").write_text("no data")
    with pytest.raises(UserError, match=r"holds no file named \*\.parquet, .*\*\.jsonl\.zst"):
        find_files(tmp_path)
