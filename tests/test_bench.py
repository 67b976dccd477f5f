"""The benchmark refuses what it cannot measure, and its table divides by the named baseline."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bench.__main__ as bench
from bench import generate, gpu_table, hellaswag, optimizers, vocabularies
from gpt2.files import read_json
from gpt2.items import tokenize_items
from gpt2.params import load, read
from gpt2.scoring import evaluate_benchmark
from gpt2.shape import ModelShape
from gpt2.tokenizer import load_encoding
from tests.analysed import VOCAB_SIZE, make_model
from tests.closure import ROOT
from tests.test_end_to_end import read_docstrings
from tests.test_harness import random_model
from tests.test_items import ITEMS

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


def test_generation_names_a_missing_baseline():
    with pytest.raises(SystemExit, match=r"absent/model\.py does not exist"):
        generate.main(["--nanogpt", "absent"])


def make_generation(**changed) -> dict:
    """A measurement in which 500 MB are read at 20 GB/s: 40 steps of 5 tokens in a second."""
    few = {"bytes_per_step": 500_000_000, "bytes_per_s": [10e9, 20e9], "ours_s": [50.0, 25.0, 30.0]}
    said = {"day": "2026-01-31", "processor": "a processor", "threads": 2, "load": 0.1}
    return {**few, **said, "nanogpt_s_at_length": [], **changed}


def test_the_time_of_a_sampler_without_a_cache_is_summed_over_all_lengths():
    # Seconds are 0.01 times the length, known at both ends and in the middle; the slower round is not looked at.
    lengths = (generate.PROMPT, 200, generate.PROMPT + generate.TOKENS - 1)
    sampled = [(length, [length, 0.01 * length]) for length in lengths]
    exact = 0.01 * sum(range(generate.PROMPT, generate.PROMPT + generate.TOKENS))
    assert generate.whole_time(sampled, min) == pytest.approx(exact)
    table = generate.tabulate(make_generation(nanogpt_s_at_length=sampled))
    # 2,500 tokens in 25 s, half of the limit of 200 tokens/s.
    assert read_cells(table, "this project")[1:] == ["100.0", "83.3", "25.0", f"{exact / 25:.1f}", "50.0 %"]
    assert read_cells(table, "nanoGPT, interpolated")[4] == "1.0" and "Limit: 200 tokens/s" in table


def test_generation_is_measured_without_a_baseline_too():
    table = generate.tabulate(make_generation())
    assert read_cells(table, "this project")[4] == "–" and "nanoGPT's sampler" not in table


def test_the_lengths_at_which_a_sampler_is_timed_reach_from_the_first_to_the_last():
    assert generate.SAMPLED[0] == generate.PROMPT
    assert generate.SAMPLED[-1] == generate.PROMPT + generate.TOKENS - 1
    assert list(generate.SAMPLED) == sorted(generate.SAMPLED)


def test_a_step_reads_every_weight_but_the_positions_once():
    model = make_model()
    weights = {name: weight for name, weight in model.named_parameters() if name not in ("wpe.weight", "wte.weight")}
    expected = sum(weight.numel() for weight in weights.values()) + VOCAB_SIZE * model.config.n_embd
    assert generate.bytes_per_step(model) == 4 * expected


def test_the_loop_chooses_the_endings_that_the_scorer_chooses():
    model = random_model()
    looped = hellaswag.choose_one_by_one(model, ITEMS, torch.device("cpu"))
    scored = evaluate_benchmark(model, tokenize_items(ITEMS, load_encoding()), "completion", 512)[1]
    assert {kind: scored[f"completion_{kind}"] for kind in looped} == looped


def test_rates_of_scoring_are_compared_item_by_item():
    table = hellaswag.tabulate({"loop": (100, 20.0), "scorer": (100, 2.0), "scorer, all": (1000, 40.0)})
    assert [read_cells(table, name)[-1] for name in ("loop", "scorer", "scorer, all")] == ["1.00", "10.00", "5.00"]
    assert read_cells(table, "loop")[1:4] == ["100", "20.00", "200.00"]


def test_scoring_names_missing_items():
    with pytest.raises(SystemExit, match=r"absent\.jsonl does not exist"):
        hellaswag.main(["--items", "absent.jsonl"])


def test_the_page_on_generation_says_what_its_measurement_says():
    page = (ROOT / generate.RESULT).read_text(encoding="utf-8")
    assert page == generate.tabulate(read_json(ROOT / generate.DATA))


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


def test_vocabularies_of_a_corpus_are_trained_and_told(tmp_path, monkeypatch, capsys):
    values = read(ROOT / "params.yaml")
    values["full"]["tokenizer_study"] |= {
        **{"vocab_sizes": [300, 400], "compound_part_min_count": 3, "technical_min_count": 5},
        "technical_min_residual_idf": 0.5,
    }
    # JSON is YAML.
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    texts = [*read_docstrings()]
    pq.write_table(pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]}), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    vocabularies.main(["a.parquet"])
    page = (tmp_path / vocabularies.RESULT).read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and page == vocabularies.tabulate(read_json(vocabularies.DATA))
    assert [read_cells(page, size)[0] for size in ("300", "400")] == ["300", "400"]
    data = read_json(vocabularies.DATA)
    seconds = data["seconds"]
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - seconds["all"])
    assert 0.01 < data["speed"]["bpe_300_train_peak_memory_gib"] <= data["peak_gib"]


def test_the_benchmark_of_vocabularies_needs_no_torch():
    code = "import sys, bench.vocabularies; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
