"""The benchmark refuses what it cannot measure, and its table divides by the named baseline."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bench.__main__ as bench
from bench import generate, gpu_table, heads, hellaswag, optimizers, prepare, prune, tokenize, vocabularies
from gpt2.data.shards import TokenSet
from gpt2.heads.similarity import Head, compare_heads, list_heads
from gpt2.hellaswag.items import tokenize_items
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.model.config import ModelShape
from gpt2.pipeline.files import read_json
from gpt2.pipeline.params import load, read
from gpt2.prune.frontier import PLAIN
from gpt2.prune.remove import PruneConfig, count_removals
from gpt2.tokenizer.encodings import load_encoding
from tests.analysed import BLOCK_SIZE, SECTIONS, VOCAB_SIZE, make_model, make_windows
from tests.closure import ROOT
from tests.hellaswag.test_harness import random_model
from tests.hellaswag.test_items import ITEMS
from tests.test_end_to_end import read_docstrings

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24}
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
    said = {"day": "2026-01-31", "torch": "2", "device": "cpu", "processor": "a processor", "load": 0.1}
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


@pytest.fixture
def parquet(tmp_path):
    """A file of three texts, one of which spells a special token."""
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["one", "<|endoftext|> two", "three 漢字"], "url": ["a", "b", "c"]}), path)
    return path


def test_both_methods_of_tokenizing_write_the_same_tokens(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 10)
    corpus = tmp_path / "corpus"
    documents, n_bytes = tokenize.write_corpus([parquet], corpus, repeat=4)
    assert (documents, n_bytes) == (12, 4 * (3 + 17 + 12))
    told = {row: tokenize.run_row(row, corpus, tmp_path / row) for row in (tokenize.NANOGPT, "1")}
    theirs = np.concatenate([np.load(path) for path in sorted((tmp_path / tokenize.NANOGPT).iterdir())])
    splits = [TokenSet(tmp_path / "1", split) for split in tokenize.SPLITS]
    ours = np.concatenate([split.read(0, split.n_tokens) for split in splits])
    assert theirs.tolist() == ours.tolist()
    assert {row: turn["tokens"] for row, turn in told.items()} == dict.fromkeys(told, len(ours))
    assert tokenize.run_row(f"{tokenize.BARE}2", corpus, tmp_path)["bytes_per_s"] > 0


def test_rates_of_tokenizing_are_those_of_the_fastest_turn():
    def turn(seconds: float, parent: int, worker: int = 0) -> dict:
        return {
            "seconds": seconds,
            "cpu_s": 2 * seconds,
            "tokens": 1000,
            "parent": parent * 2**20,
            "worker": worker * 2**20,
        }

    turns = {
        f"{tokenize.BARE}1": [{"bytes_per_s": 9e6}, {"bytes_per_s": 10e6}],
        f"{tokenize.BARE}2": [{"bytes_per_s": 20e6}],
        f"{tokenize.BARE}4": [{"bytes_per_s": 30e6}],
        tokenize.NANOGPT: [turn(20, 300, 60), turn(25, 310, 50)],
        "1": [turn(16, 200), turn(14, 210)],
        "4": [turn(5, 220, 140), turn(9, 190, 150)],
    }
    table = tokenize.tabulate(turns, n_bytes=120_000_000, cores=4)
    # Two processes of four cores: 6 MB/s of 20.
    theirs = ["2", "6.0", "50", "1.00", "–", "20.0", "30 %", "40.0", "310 MiB", "60 MiB"]
    assert read_cells(table, "build-nanogpt's method")[1:] == theirs
    one = ["1", "8.6", "71", "1.43", "1.00", "10.0", "86 %", "28.0", "210 MiB", "–"]
    assert read_cells(table, "this project")[1:] == one
    last = [cell.strip() for cell in table.splitlines()[4].strip("|").split("|")]
    assert last[1:] == ["4", "24.0", "200", "4.00", "2.80", "30.0", "80 %", "10.0", "220 MiB", "150 MiB"]


def test_tokenizing_names_missing_files():
    with pytest.raises(SystemExit, match=r"absent\.parquet does not exist"):
        tokenize.main(["absent.parquet"])


@pytest.mark.parametrize("device", generate.DEVICES)
def test_the_page_on_generation_says_what_its_measurement_says(device):
    page = ROOT / generate.RESULTS / f"generate_{device}.md"
    assert page.read_text(encoding="utf-8") == generate.tabulate(read_json(page.with_suffix(".json")))


def test_transformers_whole_maps_give_the_patterns_that_are_streamed():
    model, idx = make_model(), make_windows(3)[:, :-1]
    streamed = compare_heads(model, idx, 2, outputs=False)["pattern"]
    assert abs(heads.build_baseline(model)(idx) - streamed).max() < 1e-5


def test_the_limit_of_the_head_study_counts_products_by_hand():
    config = make_model(n_layer=1, n_head=2).config
    # 32 channels, 24 tokens: a query has 12.5 keys on average; two heads of 16 channels form three pairs.
    model = 2 * 12 * 32**2 + 2 * 2 * 32 * 12.5
    scores, pairs = 2 * 2 * 16 * 12.5, 2 * 3 * 12.5
    outputs = 2 * 2 * 16 * 32 + 2 * 3 * (16 + 32)
    plain, whole = (heads.count_pass(config, 10, written) for written in (False, True))
    assert plain[:2] == (10 * model, 10 * (scores + pairs))
    assert whole[:2] == (10 * model, 10 * (scores + pairs + outputs))
    assert plain.moved == 10 * 4 * 8 * 2 * 12.5 and whole.moved - plain.moved == 10 * 2 * 8 * 2 * 32
    # 4 products of 2 × 16 rows by 2 × 16 rows over 32 channels, of which 3 of 4 blocks are pairs.
    assert heads.count_circuits(config).fp64 == 4 * 2 * 32 * 32 * 32 * 3 / 4
    limits = heads.Limits(fp32=2.0, fp64=4.0, bandwidth=0.0)
    assert heads.Work(10, 20, 0).seconds(limits) == 10
    table = heads.tabulate({"study": 40.0}, {"study": heads.Work(10, 20, 0)}, limits)
    assert read_cells(table, "study")[1:] == ["40.00", "10.00", "25 %"]


def test_the_head_study_names_missing_tokens():
    with pytest.raises(SystemExit, match=r"absent/val\.json does not exist"):
        heads.main(["absent"])


def test_the_head_study_is_measured_at_any_size(tmp_path, monkeypatch):
    values = {"scale": "tiny", "tiny": {**SECTIONS, "model": SHAPE}}
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(heads.PEAK_EDGE, "cpu", 32)
    heads.main(["--scale", "tiny", "--rounds", "1", "--baseline_tokens", "48"])
    page = (tmp_path / heads.RESULTS / "heads_cpu.md").read_text(encoding="utf-8")
    assert "8 heads, 192 random tokens in windows of 24" in page
    assert "| the whole study |" in page and read_cells(page, heads.BASELINE)[1:4:2] == ["48", "1.00"]


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


def test_preparing_is_compared_with_its_parts_and_the_goal():
    seconds = {"prepare": 2.0, "reading": 0.2, "SHA-256": 0.3, "writing": 0.5}
    table = prepare.tabulate(seconds, n_bytes=200_000_000)
    assert read_cells(table, "limit")[1:] == ["1.00", "200"]
    assert read_cells(table, "prepare")[1:] == ["2.00", "100"]
    assert "2.00 times the limit" in table and "Goal of 50 MB/s a core: reached" in table
    assert "not reached" in prepare.tabulate(seconds, n_bytes=90_000_000)


def test_preparing_is_measured_on_a_folder_of_parquet(tmp_path, monkeypatch, capsys):
    (tmp_path / "source").mkdir()
    texts = [f"Text {i} of many, {'and so on ' * 30}" for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "source" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    prepare.main(["source", "--rounds", "1"])
    assert capsys.readouterr().out == (tmp_path / prepare.RESULT).read_text()
    with pytest.raises(SystemExit, match=r"prepare\.path = 'absent' is not a folder"):
        prepare.main(["absent"])


def test_the_limit_of_pruning_counts_what_passes_the_model():
    model, text = make_model(), prune.Text(*map(make_windows, (2, 3)))
    heads = list_heads(model.config)
    orders = {"taylor": [heads], "loss": [heads[7::-1]]}
    counts = prune.count_operations(model, text, orders, [torch.arange(4) + 4 * layer for layer in range(3)])
    config, tokens = model.config, BLOCK_SIZE
    classifier = 2 * 32 * VOCAB_SIZE
    # A head has four products of 32 x 8 weights and looks at half of the context with 8 channels, twice.
    head, mlp = 2 * 4 * 32 * 8 + 4 * 8 * BLOCK_SIZE / 2, 2 * 8 * 32**2
    whole = 12 * head + 3 * mlp + classifier
    assert prune.operations_from(config, 0, set()) + classifier == whole
    assert prune.operations_from(config, 2, {Head(1, 0), Head(2, 3)}) == 3 * head + mlp
    assert counts[prune.PARTS[0]] == 3 * whole * 2 * tokens
    # The first step of the search alone: the four heads of each of the first two layers pass three and two layers.
    first = sum(4 * ((4 * layers - 1) * head + layers * mlp + classifier) for layers in (3, 2))
    assert counts[prune.PARTS[1]] > first * 2 * tokens
    # Both orders share only the whole model.
    removed = {count for count in count_removals(model, prune.SHARES)}
    sets = whole + 2 * sum(whole - count * head for count in removed if count)
    assert counts[prune.PARTS[2]] == pytest.approx(sets * 3 * tokens)


def test_pruning_is_measured_part_by_part():
    model = make_model()
    config = load("prune", PruneConfig, {"scale": "tiny", "tiny": SECTIONS})
    seconds, orders, _ = prune.measure(model, config, prune.draw_text(model, config))
    assert tuple(seconds) == prune.PARTS and all(taken > 0 for taken in seconds.values())
    assert tuple(orders) == tuple(column.criterion for column in PLAIN)
    table = prune.tabulate(dict.fromkeys(prune.PARTS, 2.0), dict.fromkeys(prune.PARTS, 1e9), peak=1e9)
    assert read_cells(table, "all")[1:] == ["6.0", "0.00", "3.0", "50 %"]


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
    data = read_json(vocabularies.DATA)
    seconds = data["seconds"]
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - seconds["all"])
    assert data["peak_gib"] > 0.01


def test_the_benchmark_of_vocabularies_needs_no_torch():
    code = "import sys, bench.vocabularies; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
