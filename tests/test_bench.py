"""The benchmarks compare methods that give the same results, run at any size, and name what they lack."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bench.__main__ as training
from bench import generate, heads, hellaswag, prepare, prune, tokenize, vocabularies
from gpt2.data.shards import TokenSet
from gpt2.heads.similarity import compare_heads
from gpt2.hellaswag.items import tokenize_items
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.pipeline.files import read_json
from gpt2.pipeline.params import load, read
from gpt2.prune.frontier import PLAIN
from gpt2.prune.remove import PruneConfig
from gpt2.tokenizer.encodings import load_encoding
from tests.analysed import SECTIONS, VOCAB_SIZE, make_model, make_windows
from tests.closure import ROOT
from tests.hellaswag.test_harness import random_model
from tests.hellaswag.test_items import ITEMS
from tests.test_end_to_end import read_docstrings


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (training.main, [], r"train\.json does not exist; run make repro"),
        (training.main, ["--nanogpt", "absent"], r"absent/model\.py does not exist"),
        (generate.main, ["--nanogpt", "absent"], r"absent/model\.py does not exist"),
        (hellaswag.main, ["--items", "absent.jsonl"], r"absent\.jsonl does not exist"),
        (tokenize.main, ["absent.parquet"], r"absent\.parquet does not exist"),
        (heads.main, ["absent"], r"absent/val\.json does not exist"),
        (prepare.main, ["absent"], r"prepare\.path = 'absent' is not a folder"),
    ],
)
def test_missing_inputs_are_named(tmp_path, monkeypatch, main, arguments, message):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(arguments)


# --- equal results of both methods


def test_the_loop_chooses_the_endings_that_the_scorer_chooses():
    model = random_model()
    looped = hellaswag.choose_one_by_one(model, ITEMS, torch.device("cpu"))
    scored = evaluate_benchmark(model, tokenize_items(ITEMS, load_encoding()), "completion", 512)[1]
    assert {kind: scored[f"completion_{kind}"] for kind in looped} == looped


def test_both_methods_of_tokenizing_write_the_same_tokens(tmp_path, monkeypatch):
    # One of the three texts spells a special token.
    texts = pa.table({"text": ["one", "<|endoftext|> two", "three 漢字"], "url": ["a", "b", "c"]})
    pq.write_table(texts, tmp_path / "texts.parquet")
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 10)
    corpus = tmp_path / "corpus"
    documents, n_bytes = tokenize.write_corpus([tmp_path / "texts.parquet"], corpus, repeat=4)
    assert (documents, n_bytes) == (12, 4 * (3 + 17 + 12))
    turns = {row: tokenize.run_row(row, corpus, tmp_path / row) for row in (tokenize.NANOGPT, "1")}
    theirs = np.concatenate([np.load(path) for path in sorted((tmp_path / tokenize.NANOGPT).iterdir())])
    splits = [TokenSet(tmp_path / "1", split) for split in tokenize.SPLITS]
    ours = np.concatenate([split.read(0, split.n_tokens) for split in splits])
    assert theirs.tolist() == ours.tolist()
    assert {row: turn["tokens"] for row, turn in turns.items()} == dict.fromkeys(turns, len(ours))
    assert tokenize.run_row(f"{tokenize.BARE}2", corpus, tmp_path)["bytes_per_s"] > 0


def test_transformers_whole_maps_give_the_patterns_that_are_streamed():
    model, idx = make_model(), make_windows(3)[:, :-1]
    streamed = compare_heads(model, idx, 2, outputs=False)["pattern"]
    assert abs(heads.build_baseline(model)(idx) - streamed).max() < 1e-5


def test_a_step_of_generation_reads_every_weight_but_the_positions_once():
    model = make_model()
    weights = {name: weight for name, weight in model.named_parameters() if name not in ("wpe.weight", "wte.weight")}
    expected = sum(weight.numel() for weight in weights.values()) + VOCAB_SIZE * model.config.n_embd
    assert generate.bytes_per_step(model) == 4 * expected


# --- runs at a small size


def test_the_head_study_is_measured_at_any_size(tmp_path, monkeypatch):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24}
    (tmp_path / "params.yaml").write_text(json.dumps({"scale": "tiny", "tiny": {**SECTIONS, "model": shape}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(heads.PEAK_EDGE, "cpu", 32)
    heads.main(["--scale", "tiny", "--rounds", "1", "--baseline_tokens", "48"])
    assert "8 heads, 192 random tokens in windows of 24" in (tmp_path / heads.RESULTS / "heads_cpu.md").read_text()


def test_preparing_is_measured_on_a_folder_of_parquet(tmp_path, monkeypatch, capsys):
    (tmp_path / "source").mkdir()
    texts = [f"Text {i} of many, {'and so on ' * 30}" for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "source" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    prepare.main(["source", "--rounds", "1"])
    assert capsys.readouterr().out == (tmp_path / prepare.RESULT).read_text()


def test_pruning_is_measured_part_by_part():
    model = make_model()
    config = load("prune", PruneConfig, {"scale": "tiny", "tiny": SECTIONS})
    seconds, orders, _ = prune.measure(model, config, prune.draw_text(model, config))
    assert tuple(seconds) == prune.PARTS and all(taken > 0 for taken in seconds.values())
    assert tuple(orders) == tuple(column.criterion for column in PLAIN)


def test_vocabularies_of_a_corpus_are_trained_and_timed(tmp_path, monkeypatch):
    values = read(ROOT / "params.yaml")
    values["full"]["tokenizer_study"] |= {
        **{"vocab_sizes": [300, 400], "compound_part_min_count": 3, "technical_min_count": 5},
        "technical_min_residual_idf": 0.5,
    }
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    texts = [*read_docstrings()]
    pq.write_table(pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]}), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    vocabularies.main(["a.parquet"])
    seconds = read_json(vocabularies.DATA)["seconds"]
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - seconds["all"])
