"""McNemar's test on two files of scores, from folders and from revisions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from gpt2.hellaswag.__main__ import ACCURACIES, SCORES, Comparison, compare, main, read_scores
from gpt2.pipeline.files import UserError


def make_scores(seed: int, n: int = 40) -> pd.DataFrame:
    """Random choices; the labels do not depend on the seed."""
    rng = np.random.default_rng(seed)
    chosen = {name: rng.integers(0, 4, n) for name in ACCURACIES}
    return pd.DataFrame({"item": range(n), "label": np.arange(n) * 7 % 4, **chosen})


def write_scores(path: Path, seed: int, n: int = 40) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_scores(seed, n).to_csv(path, index=False)
    return str(path)


def test_items_are_counted_by_who_is_right():
    label = [0, 1, 2, 3, 0, 1]
    a = pd.DataFrame({"label": label, **{name: [0, 1, 2, 0, 0, 0] for name in ACCURACIES}})
    b = pd.DataFrame({"label": label, **{name: [0, 0, 0, 3, 1, 0] for name in ACCURACIES}})
    assert compare(a, b) == dict.fromkeys(ACCURACIES, Comparison(both=1, only_a=3, only_b=1, neither=1))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 6, 2 / 2**6), (9, 3, 2 * (1 + 12 + 66 + 220) / 2**12)],
)
def test_p_is_that_of_a_fair_coin(only_a, only_b, p):
    assert Comparison(10, only_a, only_b, 10).p_value == pytest.approx(p)


# Newcombe 1998, method 10, and Fagerland et al. 2014 with the data of Cavo et al. 2012.
@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((36, 2, 12, 0), 0.0569, 0.3404), ((54, 0, 0, 0), -0.0664, 0.0664), ((59, 16, 6, 80), -0.1186, -0.0046)],
)
def test_the_interval_is_the_published_one(cells, low, high):
    comparison = Comparison(*cells)
    assert comparison.interval == pytest.approx((low, high), abs=5e-5)
    difference, half = comparison.difference
    assert difference == pytest.approx((cells[2] - cells[1]) / sum(cells))
    assert half == pytest.approx((high - low) / 2, abs=5e-5)
    both, only_a, only_b, neither = cells
    assert Comparison(both, only_b, only_a, neither).interval == pytest.approx((-high, -low), abs=5e-5)


@pytest.mark.parametrize("spelling", [[], ["--compare"]])
def test_the_command_prints_both_models_and_p(tmp_path, capsys, spelling):
    sources = [write_scores(tmp_path / name, seed) for seed, name in enumerate("ab")]
    main([*spelling, *sources])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 items")
    right = [(make_scores(seed)["harness_acc_norm"] == make_scores(seed)["label"]) for seed in range(2)]
    (row,) = [line.split() for line in lines if line.startswith("harness_acc_norm")]
    counts = [(right[0] & right[1]), (right[0] & ~right[1]), (~right[0] & right[1]), (~right[0] & ~right[1])]
    assert row[1:5] == [str(cell.sum()) for cell in counts]
    assert row[5:7] == [f"{100 * r.mean():.2f}" for r in right]
    difference, low, high = (float(cell.strip("[],")) for cell in row[7:10])
    assert low < difference == pytest.approx(100 * (right[1].mean() - right[0].mean()), abs=0.01) and difference < high
    assert float(row[-1]) == pytest.approx(binomtest(int(row[2]), int(row[2]) + int(row[3])).pvalue, rel=1e-2)


@pytest.mark.parametrize("other", [make_scores(1, n=39), make_scores(1).assign(label=0)], ids=["number", "labels"])
def test_scores_of_other_items_are_not_compared(other):
    with pytest.raises(UserError, match=f"A has 40 items, B {len(other)}, or other labels"):
        compare(make_scores(0), other)


def test_a_file_that_holds_no_scores_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("item,label\n0,1\n")
    with pytest.raises(UserError, match=r"other\.csv .*completion_acc, .*harness_acc_norm"):
        read_scores(str(tmp_path / "other.csv"))


def test_revisions_are_read_from_the_cache_of_dvc(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    git, dvc = ("git", "-c", "user.name=a", "-c", "user.email=a@b"), (sys.executable, "-m", "dvc", "-q")
    call(*git, "init", "-q")
    call(*dvc, "init")
    (tmp_path / ".gitignore").write_text("data/*.csv\n")
    for seed in range(2):
        write_scores(SCORES, seed)
        call(*dvc, "add", str(SCORES))
        call(*git, "add", ".")
        call(*git, "commit", "-qm", f"scores {seed}")
    SCORES.unlink()
    for source, seed in (("HEAD~1", 0), ("HEAD", 1)):
        pd.testing.assert_frame_equal(read_scores(source), make_scores(seed))
    write_scores(SCORES, 2)
    pd.testing.assert_frame_equal(read_scores("workspace"), make_scores(2))
    with pytest.raises(SystemExit, match=r"hellaswag: nowhere .*hellaswag_scores\.csv.*dvc repro hellaswag"):
        main(["nowhere", "HEAD"])
    assert capsys.readouterr().out == ""
