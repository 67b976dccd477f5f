"""Rows of a run: written, cut to the sizes in a checkpoint, and refused if they are damaged."""

import pytest

from gpt2.train.curves import TABLES, RowFiles, read_rows

ROWS = {
    "train": [[1, 128, 0.1 + 0.2, 1e-05, 3.5], [2, 256, 5e-324, 0.5, 1e300]],
    "eval": [[0, 0, 2.5, 0.25, 1 / 3]],
    "layers": [[0, -1, 1.5, 2.5]],
}


def write(folder, sizes=None) -> dict[str, int]:
    with RowFiles(folder, sizes) as files:
        for table, rows in ROWS.items():
            for row in rows:
                files.append(table, row)
        return files.sync()


def test_rows_are_read_back_to_the_bit(tmp_path):
    assert read_rows(tmp_path, write(tmp_path)) == ROWS
    assert all(len(row) == len(TABLES[table]) for table, rows in ROWS.items() for row in rows)


def test_files_are_cut_to_the_given_sizes_and_appended_to(tmp_path):
    sizes = write(tmp_path)
    write(tmp_path, sizes)
    assert read_rows(tmp_path, sizes) == ROWS
    # Twice as long by now; a run without a checkpoint starts with nothing.
    assert write(tmp_path) == sizes
    assert read_rows(tmp_path, dict.fromkeys(TABLES, 0)) == {table: [] for table in TABLES}


@pytest.mark.parametrize("damage", ["gone", "short", "torn"])
def test_damaged_rows_are_refused(tmp_path, damage):
    sizes = write(tmp_path)
    path = tmp_path / "train.csv"
    content = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(content[:-1] if damage == "short" else content.replace(",", "\n", 1))
    with pytest.raises(ValueError, match=r"train\.csv|zip\(\)|invalid literal"):
        read_rows(tmp_path, sizes)
