"""The benchmark refuses what it cannot measure, and its table divides by the named baseline."""

from types import SimpleNamespace

import pytest

import bench.__main__ as bench
from bench import gpu_table, optimizers
from gpt2.files import read_json
from gpt2.params import load, read
from gpt2.shape import ModelShape
from tests.closure import ROOT

OURS = "this project, 1 process"
TRANSFORMERS = "transformers GPT2LMHeadModel, eager"


def make_row(name: str, *tokens_per_s: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, tokens_per_s=tokens_per_s, last={"peak_memory_gib": 0.5, "loss": 10.0})


def read_cells(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"train\.json does not exist; run make repro"),
        (["--nanogpt", "absent"], r"absent/model\.py does not exist"),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        bench.main(arguments)


def test_ratios_and_the_limit_count_the_fastest_round():
    peak = {"gflops": 100.0, "flops_per_token": 50e6}
    rows = [make_row(OURS, 1000, 1500, 1200), make_row(TRANSFORMERS, 500, 600, 100), make_row(bench.NANOGPT, 400)]
    with_nanogpt, without = bench.tabulate(rows, peak), bench.tabulate(rows[:2], peak)
    # 100 GFLOP/s over 50 million operations are 2,000 tokens/s.
    assert read_cells(with_nanogpt, OURS)[1:4] == ["1,500", "1,200", "3.75"]
    assert read_cells(with_nanogpt, OURS)[-1] == "75 %" and "Limit: 2,000 tokens/s" in with_nanogpt
    assert read_cells(without, OURS)[3] == "2.50" and f"ratio to {TRANSFORMERS}" in without


def test_the_classifier_is_the_share_of_the_operations_that_the_text_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    shape = load("model", ModelShape, {**read(), "scale": "tiny"})
    classifier = 6 * 50257 * shape.n_embd
    blocks = 6 * 12 * shape.n_layer * shape.n_embd**2 + 12 * shape.n_layer * shape.n_embd * shape.block_size
    assert "seven eighths of the operations" in bench.__doc__.replace("\n", " ")
    assert abs(classifier / (classifier + blocks) - 7 / 8) < 0.02


def test_pages_say_what_their_measurements_say(tmp_path, monkeypatch):
    for module, build in (
        (gpu_table, gpu_table.main),
        (optimizers, lambda: optimizers.tabulate(sorted((ROOT / "bench/results/optimizers").glob("*.json")))),
    ):
        committed = (ROOT / module.RESULT).read_text(encoding="utf-8")
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(module, "RESULT", tmp_path / "page.md")
        # The page names its picture, which lies beside it.
        monkeypatch.setattr(module, "PICTURE", tmp_path / module.PICTURE.name)
        build()
        assert (tmp_path / "page.md").read_text(encoding="utf-8") == committed


def test_pages_notice_a_measurement_that_changed(monkeypatch):
    results = {path.stem: read_json(path) for path in sorted((ROOT / gpu_table.FOLDER).glob("*.json"))}
    monkeypatch.chdir(ROOT)
    same = "- “{}” and “{}”: the same bits, weights and all rows.".format(
        results["exact"]["says"], results["exact-killed"]["says"]
    )
    assert same in gpu_table.describe(results)
    results["exact-killed"]["sha256"] = "0"
    assert same not in gpu_table.describe(results)
