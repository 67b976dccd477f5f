"""Figures worked out by hand, word rules on hand-made text, the width of equal cost, and the stage."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from ruamel.yaml import YAML

from gpt2.model.config import GPTConfig
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import build
from gpt2.tokenizer.bpe import train_encodings
from gpt2.tokenizer.encodings import PATTERN, load_encoding, make_encoding
from gpt2.tokenizer_study.study import (
    ModelShape,
    TokenizerStudyConfig,
    cheaper_above_n_embd,
    measure_text,
    measure_words,
    renyi_efficiency,
    segment,
    segment_examples,
)
from gpt2.tokenizer_study.words import (
    BANDS,
    WordCounts,
    WordRules,
    band_words,
    count_words,
    group_words,
    residual_idf,
    split_compound,
    words,
)
from stages import tokenizer_study
from tests.settings import HARDWARE

SIZES = (300, 600, 2000)
RULES = {
    "rare_max_count": 3,
    "compound_min_letters": 8,
    "compound_part_min_letters": 4,
    "compound_part_min_count": 5,
    "technical_min_count": 5,
    "technical_min_residual_idf": 1.0,
}
SECTION = {
    "vocab_sizes": list(SIZES),
    "held_out_bytes": 10**6,
    "n_examples": 9,
    **RULES,
}
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64}
SHAPE = ModelShape(**MODEL)
VOCABULARY = {"train_bytes": 10**7}
RUNS = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "budgets": [4e8], "seeds": [1, 2]},
    **{"max_lrs": [4e-3, 8e-3], "search_seeds": 1, "min_lr_fraction": 0.1, "warmup_fraction": 0.1},
    **{"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1, "grad_clip": 1.0, "batch_windows": 2, "micro_batch": 64},
    **{"precision": "float32", "text_bytes": 50_000, "eval_bytes": 25_000},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """NumPy's docstrings, about 1 MB."""
    return [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)]


@pytest.fixture(scope="module")
def encodings(texts):
    return train_encodings(texts[::2], SIZES)


# Figures


def test_renyi_efficiency_by_hand():
    assert renyi_efficiency(np.array([5, 5, 5, 5]), 4) == pytest.approx(1)
    assert renyi_efficiency(np.array([7, 0]), 2) == 0
    # p = 1/2, 1/4, 1/4 and alpha 2: entropy -log(1/4 + 1/16 + 1/16) = log(8/3).
    assert renyi_efficiency(np.array([2, 1, 0, 1]), 4, alpha=2) == pytest.approx(math.log(8 / 3) / math.log(4))


def test_text_figures_by_hand():
    figures = measure_text([[0, 1, 0], [2] * 65], 136, 300, SHAPE)
    assert figures["bytes_per_token"] == 2
    assert figures["tokens_per_document"] == 34
    assert figures["documents_in_context_percent"] == 50
    assert figures["embedding_params"] == 4800
    model = GPT(GPTConfig(**MODEL, vocab_size=300, norm="preln"))
    assert figures["embedding_params_percent"] == pytest.approx(100 * 4800 / model.n_params())
    # fp32 logits of 64 positions.
    assert figures["logits_bytes"] == 64 * 300 * 4
    assert figures["flops_per_byte"] == training_flops_per_token(SHAPE, 300) / 2


@pytest.mark.parametrize("shape", [SHAPE, ModelShape(n_layer=12, n_head=12, n_embd=768, block_size=1024)])
def test_the_large_vocabulary_becomes_cheaper_at_the_width_found(shape):
    small, large = {"vocab_size": 1024, "bytes_per_token": 2.4}, {"vocab_size": 32768, "bytes_per_token": 3.8}

    def cost(row: dict, n_embd: int) -> float:
        wide = ModelShape(n_layer=shape.n_layer, n_head=1, n_embd=n_embd, block_size=shape.block_size)
        return training_flops_per_token(wide, row["vocab_size"]) / row["bytes_per_token"]

    found = cheaper_above_n_embd(small, large, shape)
    assert 1 < found < 100_000
    assert cost(large, found) < cost(small, found) and cost(large, found - 1) >= cost(small, found - 1)
    # A crossing beyond the widths searched, and none: one vocabulary, or one that shortens nothing.
    assert cheaper_above_n_embd(small, {**large, "bytes_per_token": 2.401}, shape) == -1
    assert cheaper_above_n_embd(small, small, shape) == -1
    assert cheaper_above_n_embd(small, {**large, "bytes_per_token": 2.4}, shape) == -1


def test_word_figures_by_hand():
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b" ab"]
    # "ab" and " ab" are one token each, "abc" two, " x" two, "xyz" three.
    figures = measure_words({"ab": 3, " ab": 4, "abc": 2, " x": 1, "xyz": 10}, make_encoding("toy", tokens))
    assert figures["tokens_per_word"] == pytest.approx((3 + 4 + 2 * 2 + 2 + 3 * 10) / 20)
    assert figures["tokens_per_word_type"] == pytest.approx(9 / 5)
    assert figures["words_kept_whole_percent"] == pytest.approx(35)
    assert figures["words_in_three_or_more_percent"] == pytest.approx(50)


def test_segments_join_to_the_word():
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b" ab"]
    toy = make_encoding("toy", tokens)
    assert segment("abab", toy) == "ab|ab"
    assert segment("cab", toy) == "|c|ab"
    assert segment("abé", toy) == "ab|\\xc3|\\xa9"
    assert segment("dataframe", load_encoding("gpt2")) == "data|frame"


def test_examples_are_shared_among_the_groups(encodings):
    groups = {
        "rare": Counter({" zzzzzz": 1, "yyyyyy": 2, " yyyyyy": 1, "short": 9}),
        "compound": Counter({" dataframe": 3, "yyyyyy": 1}),
        "technical": Counter({" tensor": 1}),
    }
    rows = segment_examples(groups, encodings, 6)
    assert [(row["word"], row["group"]) for row in rows] == [
        ("yyyyyy", "rare"),
        ("zzzzzz", "rare"),
        ("dataframe", "compound"),
        ("tensor", "technical"),
    ]
    assert all(row["bpe_300"].replace("|", "") == row["word"] for row in rows)


# Words


def test_words_are_the_letter_runs_of_gpt2s_pattern():
    assert words("Don't use df2.to_csv(DataFrame), x²  naïve\n日本") == [
        *("Don", " use", " df", "to", "csv", "DataFrame", " x", " naïve", "日本")
    ]


def test_tokens_of_words_do_not_depend_on_their_surroundings(texts, encodings):
    for encoding in encodings:
        for text in texts[1::2]:
            apart = [encoding.encode_ordinary(piece) for piece in regex.findall(PATTERN, text)]
            assert encoding.encode_ordinary(text) == [token for piece in apart for token in piece]


def test_counts_ignore_case_and_spaces():
    counts = count_words(["Array array", "the ARRAY"])
    assert counts.occurrences == {"array": 3, "the": 1}
    assert counts.documents == {"array": 2, "the": 1}
    assert counts.n_documents == 2


def test_residual_idf_by_hand():
    # 8 occurrences in 1 of 8 documents: log2(8 / 1) + log2(1 - 1/e).
    counts = WordCounts(Counter(term=8, the=8), Counter(term=1, the=8), 8)
    assert residual_idf("term", counts) == pytest.approx(3 + math.log2(1 - math.exp(-1)))
    assert residual_idf("the", counts) < 0


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("dataframe", ("data", "frame")),
        ("keepdims", ("keep", "dims")),
        ("dataframegroup", ("dataframe", "group")),
        ("overlapping", ()),  # "lapping" is unknown, "over" alone is not enough
        ("timeseries", ()),  # "series" is too rare
        ("groupbyx", ()),  # "by" is too short
        ("data", ()),
        ("multiply", ()),  # a word is not a part of itself
        ("arrayarray", ("array", "array")),
        ("timestamp", ("times", "tamp")),
    ],
)
def test_compounds(word, parts):
    known = count_words(
        ["data frame dataframe keep dims group over by x time times tamp array multiply"] * 5
    ).occurrences
    assert split_compound(word, {**known, "series": 4}, WordRules(**RULES)) == parts


def test_compound_search_backs_out_of_dead_ends_in_little_time():
    known = dict.fromkeys(["haha" * n for n in range(1, 20)], 5)
    assert split_compound("haha" * 500 + "h", known, WordRules(**RULES)) == ()


def test_groups_of_a_hand_made_text():
    filler = ["the data and the frame"] * 40
    subject = ["eigenvalue " * 20 + "the data"] + ["dataframe unusual the frame"] * 2
    counts = count_words(filler + subject)
    held_out = Counter({" Eigenvalue": 2, "dataframe": 1, " the": 5, "unseen": 1, " unusual": 1, " unusualunusual": 1})
    groups = group_words(held_out, counts, WordRules(**RULES))
    assert groups == {
        "rare": {"dataframe": 1, " unusual": 1},
        "compound": {"dataframe": 1},
        "technical": {" Eigenvalue": 2},
    }


def test_bands_go_by_the_count_in_the_training_text():
    counts = count_words(["ten " * 10 + "nine " * 9 + "twice once TWICE"])
    held_out = Counter({" Ten": 3, "ten": 1, " nine": 2, "twice": 1, " once": 4, "new": 5})
    assert band_words(held_out, counts) == {
        "10 to 99": {" Ten": 3, "ten": 1},
        "2 to 9": {" nine": 2, "twice": 1},
        "once": {" once": 4},
        "never": {"new": 5},
    }
    assert [*BANDS.values()] == sorted(BANDS.values(), reverse=True) and min(BANDS.values()) == 0


def test_empty_group_is_refused():
    counts = count_words(["dataframe data frame"] * 9)
    with pytest.raises(UserError, match="held-out words is rare under rare_max_count=3; loosen"):
        group_words(Counter({"data": 1}), counts, WordRules(**RULES))


# Parameters and the stage


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ([256, 300], r"vocab_sizes=256 must be at least 257: all bytes and end-of-text"),
        ([600, 300], r"vocab_sizes=\[600, 300\] must be increasing"),
        ([300, 300], r"without repeats"),
        ([], r"must be increasing"),
    ],
)
def test_wrong_sizes_are_refused(sizes, rule):
    with pytest.raises(UserError, match=rule):
        build(TokenizerStudyConfig, {**SECTION, "vocab_sizes": sizes}, "tiny.tokenizer_study")


def test_wrong_rule_is_refused():
    with pytest.raises(UserError, match=r"tiny\.tokenizer_study\.rare_max_count = 0"):
        build(TokenizerStudyConfig, {**SECTION, "rare_max_count": 0}, "tiny.tokenizer_study")


@pytest.fixture
def workspace(tmp_path, monkeypatch, texts):
    """A repository root with parameters and a corpus of NumPy's docstrings."""
    sections = {
        "model": MODEL,
        "vocabulary": VOCABULARY,
        "tokenizer_study": SECTION,
        "vocabulary_runs": RUNS,
        "hardware": HARDWARE,
    }
    params = {"norm": "preln", "scale": "tiny", "tiny": sections}
    YAML().dump(params, tmp_path / "params.yaml")
    splits = {"val": texts[::20], "test": texts[10::20]}
    splits["train"] = [text for i, text in enumerate(texts) if i % 10]
    for split, documents in splits.items():
        folder = tmp_path / "data/corpus" / split
        folder.mkdir(parents=True)
        table = pa.table({"text": documents, "id": [str(i) for i in range(len(documents))]})
        pq.write_table(table, folder / "00000.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stage_writes_consistent_results(workspace):
    tokenizer_study.main()
    tables = ("vocabularies", "bands", "examples", "runs", "runs_table")
    assert all((tokenizer_study.PLOTS / f"{name}.csv").is_file() for name in tables)

    def read(name: str) -> list[dict[str, str]]:
        with open(tokenizer_study.PLOTS / f"{name}.csv", encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))

    metrics = json.loads(tokenizer_study.METRICS.read_text())
    rows = read("vocabularies")
    assert [row["name"] for row in rows] == ["bpe_300", "bpe_600", "bpe_2000", "gpt2"]
    for row in rows:
        name = row.pop("name")
        assert {f"{name}_{key}": float(value) for key, value in row.items()}.items() <= metrics.items()
    trained = rows[:3]
    for key in ("tokens_per_word", "rare_tokens_per_word", "compound_tokens_per_word", "technical_tokens_per_word"):
        figures = [float(row[key]) for row in trained]
        assert figures == sorted(figures, reverse=True) and figures[-1] >= 1
    assert [float(row["bytes_per_token"]) for row in trained] == sorted(
        float(row["bytes_per_token"]) for row in trained
    )
    total = metrics["gpt2_tokens_per_document"] * metrics["gpt2_bytes_per_token"]
    n_documents = len(list(pq.read_table("data/corpus/val")["text"])) + len(pq.read_table("data/corpus/test")["text"])
    assert total * n_documents == pytest.approx(metrics["held_out_bytes"])

    bands = read("bands")
    for name in ("bpe_300", "gpt2"):
        of_name = [band for band in bands if band["name"] == name]
        assert sum(int(band["words"]) for band in of_name) == metrics["words"]
        tokens = sum(int(band["words"]) * float(band["tokens_per_word"]) for band in of_name)
        assert tokens / metrics["words"] == pytest.approx(metrics[f"{name}_tokens_per_word"])

    runs, table = read("runs"), read("runs_table")
    names = ["bpe_300", "bpe_600", "bpe_2000", "gpt2"]
    assert [row["name"] for row in table] == names
    for row in table:
        same = [run for run in runs if run["name"] == row["name"]]
        # Two rates with the first seed, the better one with the second.
        assert [run["seed"] for run in same].count("1") == 2 and len(same) == 3
        chosen = [run for run in same if run["chosen"] == "1"]
        assert {run["max_lr"] for run in chosen} == {row["max_lr"]} and row["seeds"] == "2"
        bits = [float(run["bits_per_byte"]) for run in chosen]
        assert float(row["bits_per_byte"]) == pytest.approx(sum(bits) / 2)
        low, mean, high = (float(row[f"rare_bits_per_byte{end}"]) for end in ("_ci_low", "", "_ci_high"))
        assert low < mean < high
        assert row["rare_below_even"] in "01"
        for key in ("bits_per_byte", "rare_bits_per_byte_ci_high", "rare_below_even", "max_lr"):
            assert metrics[f"{row['name']}_{key}"] == float(row[key])
    assert metrics["runs_seeds"] == 2 and metrics["budget_1_flops"] == 4e8
    assert 300 <= metrics["runs_best_vocab_size_low"] <= metrics["runs_best_vocab_size"] <= 2000
    assert metrics["runs_best_vocab_size"] <= metrics["runs_best_vocab_size_high"] <= 2000
    assert metrics["runs_best_at_edge"] in (0, 1)

    examples = read("examples")
    assert len(examples) == SECTION["n_examples"]
    assert list(examples[0]) == ["word", "group", "bpe_300", "bpe_600", "bpe_2000", "gpt2"]
    assert {row["group"] for row in examples} == {"rare", "compound", "technical"}
    speed = json.loads(Path("metrics/speed/tokenizer_study.json").read_text())
    assert speed["gpt2_encode_mb_per_s"] > 0
    assert speed["bpe_train_seconds"] > 0 and not any("bpe_300_train" in key for key in speed)


def test_stage_without_a_corpus_says_what_to_run(workspace):
    (workspace / "data/corpus/val/00000.parquet").unlink()
    with pytest.raises(SystemExit, match=r"tokenizer-study: .*val.*dvc repro"):
        tokenizer_study.main()
    assert not tokenizer_study.METRICS.exists()
