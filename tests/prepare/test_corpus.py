"""The corpus on disk is whole or absent, the same bytes each time, and read back as written."""

import pyarrow.parquet as pq
import pytest

from gpt2.pipeline.files import UserError
from gpt2.prepare import corpus
from gpt2.prepare.corpus import SPLITS, Document, batch_of, new_corpus, read_split

TEXTS = ["plain", "line\nends\r\n", "ünïcode 漢字 🙂", " spaces kept "]


def write(folder, n_train=3):
    with new_corpus(folder) as writers:
        for i in range(n_train):
            writers["train"].add(Document(f"train {i}", str(i)))
        for split in ("val", "test"):
            for text in TEXTS:
                writers[split].add(Document(text, split))
    return writers


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_texts_return_as_written_and_are_counted_in_utf8(tmp_path):
    writers = write(tmp_path / "corpus")
    assert list(read_split(tmp_path / "corpus", "val")) == TEXTS
    assert writers["val"].documents == len(TEXTS)
    assert writers["val"].bytes == sum(len(text.encode("utf-8")) for text in TEXTS)
    table = pq.read_table(tmp_path / "corpus" / "test" / "00000.parquet")
    assert table.column_names == ["text", "id"]
    assert set(table["id"].to_pylist()) == {"test"}


@pytest.mark.parametrize("n_train", [1, 4, 5, 10, 11])
def test_files_and_row_groups_are_bounded_and_nothing_is_lost(tmp_path, monkeypatch, n_train):
    monkeypatch.setattr(corpus, "ROW_GROUP_DOCUMENTS", 2)
    monkeypatch.setattr(corpus, "FILE_DOCUMENTS", 5)
    write(tmp_path / "corpus", n_train)
    assert list(read_split(tmp_path / "corpus", "train")) == [f"train {i}" for i in range(n_train)]
    files = sorted((tmp_path / "corpus" / "train").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.parquet" for i in range(-(-n_train // 5))]
    for file in files:
        footer = pq.ParquetFile(file).metadata
        assert footer.num_rows <= 5
        assert all(footer.row_group(i).num_rows <= 2 for i in range(footer.num_row_groups))


def test_the_same_documents_give_the_same_bytes_however_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROW_GROUP_BYTES", 40)
    write(tmp_path / "one", 20)
    with new_corpus(tmp_path / "two") as writers:
        writers["train"].add_batch(batch_of([Document(f"train {i}", str(i)) for i in range(20)]))
        for split in ("val", "test"):
            writers[split].add_batch(batch_of([Document(text, split) for text in TEXTS]))
    footer = pq.ParquetFile(tmp_path / "one/train/00000.parquet").metadata
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [6, 6, 5, 3]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_new_corpus_replaces_the_old_one_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_DOCUMENTS", 2)
    write(tmp_path / "corpus", n_train=9)
    write(tmp_path / "corpus", n_train=1)
    assert sorted(contents(tmp_path / "corpus")) == [
        *(f"test/0000{i}.parquet" for i in range(2)),
        "train/00000.parquet",
        *(f"val/0000{i}.parquet" for i in range(2)),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_failed_run_leaves_the_old_corpus_and_no_scraps(tmp_path):
    write(tmp_path / "corpus")
    before = contents(tmp_path / "corpus")
    with pytest.raises(KeyError), new_corpus(tmp_path / "corpus") as writers:
        writers["train"].add(Document("new", "0"))
        raise KeyError("the source broke off")
    assert contents(tmp_path / "corpus") == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("empty", SPLITS)
def test_an_empty_split_is_refused(tmp_path, empty):
    with (
        pytest.raises(UserError, match=rf"no document fell into {empty} .*prepare\.val_percent"),
        new_corpus(tmp_path / "corpus") as writers,
    ):
        for split in set(SPLITS) - {empty}:
            writers[split].add(Document("text", "0"))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_or_damaged_split_is_named(tmp_path):
    with pytest.raises(UserError, match=r"corpus/val holds no Parquet file; run"):
        list(read_split(tmp_path / "corpus", "val"))
    write(tmp_path / "corpus")
    file = tmp_path / "corpus" / "val" / "00000.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00000\.parquet cannot be read"):
        list(read_split(tmp_path / "corpus", "val"))
