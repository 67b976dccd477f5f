"""Files are whole or absent, the same on every platform, and a fault names the file and its remedy."""

import json
import math

import pytest

from gpt2.pipeline.files import UserError, atomic_path, read_json, write_csv, write_json, write_text


def test_a_block_that_succeeds_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), FileNotFoundError()])
def test_a_block_that_fails_or_writes_nothing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        # A block that ends without a file raises FileNotFoundError by itself.
        if not isinstance(error, FileNotFoundError):
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_plain_line_ends(tmp_path):
    write_text(tmp_path / "a.txt", "naïve 漢字\nsecond\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve 漢字\nsecond\n".encode()


def test_json_is_sorted_exact_and_read_back(tmp_path):
    values = {"b": 0.1 + 0.2, "a": {"z": 1, "y": [1e-300, "ü"]}}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    text = (tmp_path / "a.json").read_text()
    assert list(json.loads(text)) == ["a", "b"]
    assert text.endswith("}\n")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_hold_is_refused_and_the_old_file_stands(tmp_path, bad):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": bad})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json does not exist; run the stage"),
        *((damaged, r"a\.json is not valid JSON .*; delete it") for damaged in (b"", b'{"a": 1', b"\xff\xfe")),
    ],
)
def test_an_absent_or_damaged_file_is_named_with_the_remedy(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_a_table_keeps_every_bit_and_quotes_what_needs_it(tmp_path):
    write_csv(tmp_path / "a.csv", ("x", "text"), [(0.1 + 0.2, 'a "b", c'), (1e-17, "line\nend ü")])
    assert (tmp_path / "a.csv").read_bytes() == (
        'x,text\n0.30000000000000004,"a ""b"", c"\n1e-17,"line\nend ü"\n'.encode()
    )


def test_a_table_whose_rows_break_off_is_not_written(tmp_path):
    def rows():
        yield (1,)
        raise RuntimeError("broke off")

    with pytest.raises(RuntimeError):
        write_csv(tmp_path / "a.csv", ("x",), rows())
    assert list(tmp_path.iterdir()) == []
