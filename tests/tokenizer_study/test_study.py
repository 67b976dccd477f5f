"""Vocabularies equal in both libraries, figures worked out by hand, word rules on hand-made text, and refusals."""

import csv
import json
import math
import os
import subprocess
import sys
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
from gpt2.tokenizer import bpe
from gpt2.tokenizer.bpe import (
    VocabularyConfig,
    byte_of_character,
    encoding_for,
    take,
    train_encodings,
    train_tokenizer,
    trained_tokens,
)
from gpt2.tokenizer.encodings import PATTERN, encoding_of, load_encoding, make_encoding, ranked_tokens
from gpt2.tokenizer_study.runs import VOCABULARY_RUN_COLUMNS, VOCABULARY_TABLE_COLUMNS
from gpt2.tokenizer_study.study import (
    ModelShape,
    TokenizerStudyConfig,
    measure_text,
    measure_words,
    renyi_efficiency,
    segment,
    segment_examples,
    train_apart,
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
from tests.closure import ROOT
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
    **{"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "budgets": [4e8, 5e8], "seeds": [1]},
    **{"max_lr": 4e-3, "min_lr_fraction": 0.1, "warmup_fraction": 0.1, "beta1": 0.9, "beta2": 0.98},
    **{"weight_decay": 0.1, "grad_clip": 1.0, "batch_windows": 2, "micro_batch": 64, "precision": "float32"},
    **{"text_bytes": 50_000, "eval_bytes": 50_000},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """NumPy's docstrings, about 1 MB."""
    return [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)]


@pytest.fixture(scope="module")
def encodings(texts):
    return train_encodings(texts[::2], SIZES)


# Vocabularies


def test_ids_are_bytes_then_merges_then_end_of_text(encodings):
    for size, encoding in zip(SIZES, encodings, strict=True):
        assert (encoding.name, encoding.n_vocab, encoding.eot_token) == (f"bpe_{size}", size, size - 1)
        assert {encoding.decode_single_token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}


@pytest.mark.parametrize(
    "text", ["", " ", "naïve 東京 🙂\r\n\t x_1  y", "it's  we'll\n\n\n", "\x00\x7f\xad a", "a" * 999]
)
def test_round_trip(encodings, text):
    for encoding in encodings:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_smaller_vocabulary_is_a_prefix_and_tiktoken_encodes_like_tokenizers(texts, encodings):
    for size, encoding in zip(SIZES, encodings, strict=True):
        alone = train_tokenizer(texts[::2], size - 1)
        assert trained_tokens(alone) == [encoding.decode_single_token_bytes(i) for i in range(size - 1)]
        for text in texts:
            assert encoding.encode_ordinary(text) == alone.encode(text).ids


def test_order_of_texts_does_not_matter(texts, encodings):
    (again,) = train_encodings(texts[::2][::-1], SIZES[-1:])
    assert again.token_byte_values() == encodings[-1].token_byte_values()
    assert again.encode_ordinary(texts[1]) == encodings[-1].encode_ordinary(texts[1])


def test_number_of_threads_does_not_matter():
    program = (
        "import hashlib, numpy as np\n"
        "from gpt2.tokenizer.bpe import train_tokenizer, trained_tokens\n"
        "texts = [v.__doc__ for _, v in sorted(vars(np).items()) if isinstance(v.__doc__, str)]\n"
        "print(hashlib.sha256(repr(trained_tokens(train_tokenizer(texts, 3000))).encode()).hexdigest())\n"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "4"}, {"TOKENIZERS_PARALLELISM": "false"}]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **extra}, cwd=ROOT, capture_output=True, check=True
        ).stdout
        for extra in settings
    }
    assert len(digests) == 1


def test_first_merge_is_the_most_frequent_pair():
    (encoding,) = train_encodings(["abab abab xyz"], [258])
    assert encoding.decode_single_token_bytes(256) == b"ab"


def test_byte_characters_are_those_of_gpt2s_file():
    characters = byte_of_character()
    assert sorted(characters.values()) == list(range(256))
    assert (characters["Ġ"], characters["Ċ"], characters["a"], characters["é"]) == (ord(" "), ord("\n"), ord("a"), 0xE9)


def test_text_too_small_for_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"300 tokens is more than the 25\d that 1 documents .*vocabulary\.train_bytes"):
        train_encodings(["one two"], [257, 300])


def test_vocabulary_smaller_than_bytes_and_end_of_text_is_refused():
    with pytest.raises(UserError, match=r"vocabulary of 256 tokens lacks some of the 256 bytes and end-of-text"):
        train_encodings(["one two"], [256])


# Figures


def test_renyi_efficiency_by_hand():
    assert renyi_efficiency(np.array([5, 5, 5, 5]), 4) == pytest.approx(1)
    assert renyi_efficiency(np.array([7, 0]), 2) == 0
    # p = 1/2, 1/4, 1/4 and alpha 2: entropy -log(1/4 + 1/16 + 1/16) = log(8/3).
    assert renyi_efficiency(np.array([2, 1, 0, 1]), 4, alpha=2) == pytest.approx(math.log(8 / 3) / math.log(4))


def test_training_flops_of_gpt2():
    gpt2 = ModelShape(n_layer=12, n_head=12, n_embd=768, block_size=1024)
    # 84,934,656 weights in the blocks, 38,597,376 in the output layer; 113,246,208 for attention.
    assert training_flops_per_token(gpt2, 50257) == 6 * (84_934_656 + 38_597_376) + 113_246_208


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


def test_take_stops_before_the_limit():
    assert take(["é", "ab", "c"], 4, "key") == ["é", "ab"]
    with pytest.raises(UserError, match="key=1: the first document has more bytes"):
        take(["é"], 1, "key")


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
    assert list(runs[0]) == list(VOCABULARY_RUN_COLUMNS) and list(table[0]) == list(VOCABULARY_TABLE_COLUMNS)
    names = ["bpe_300", "bpe_600", "bpe_2000", "gpt2"]
    expected = [(str(budget), name, "1") for budget in (4e8, 5e8) for name in names]
    assert [(run["budget"], run["name"], run["seed"]) for run in runs] == expected
    for row in table[4:]:
        assert metrics[f"{row['name']}_bits_per_byte"] == float(row["bits_per_byte"])
    assert metrics["runs_seeds"] == 1 and metrics["budget_2_flops"] == 5e8

    examples = read("examples")
    assert len(examples) == SECTION["n_examples"]
    assert list(examples[0]) == ["word", "group", "bpe_300", "bpe_600", "bpe_2000", "gpt2"]
    assert {row["group"] for row in examples} == {"rare", "compound", "technical"}
    speed = json.loads(Path("metrics/speed/tokenizer_study.json").read_text())
    assert speed["gpt2_encode_mb_per_s"] > 0
    for size in SIZES:
        assert speed[f"bpe_{size}_train_seconds"] > 0 and speed[f"bpe_{size}_train_peak_memory_gib"] > 0.01


def test_stage_without_a_corpus_says_what_to_run(workspace):
    (workspace / "data/corpus/val/00000.parquet").unlink()
    with pytest.raises(SystemExit, match=r"tokenizer-study: .*val.*dvc repro"):
        tokenizer_study.main()
    assert not tokenizer_study.METRICS.exists()


def test_the_vocabulary_of_tokenize_is_that_of_the_study(workspace):
    config = VocabularyConfig(**VOCABULARY)
    studied, _ = train_apart(SIZES, config, Path("data/corpus"))
    for expected in studied:
        alone = encoding_for(expected.name, Path("data/corpus"), config)
        assert alone.name == expected.name and ranked_tokens(alone) == ranked_tokens(expected)
    assert encoding_for("gpt2", Path("data/corpus"), config).name == "gpt2"


def test_the_text_of_vocabularies_has_a_limit(workspace):
    with pytest.raises(UserError, match=r"vocabulary of 2000 tokens is more than the \d+ .*vocabulary\.train_bytes"):
        train_apart([300, 2000], VocabularyConfig(train_bytes=3000), Path("data/corpus"))
    with pytest.raises(UserError, match=r"vocabulary\.train_bytes=1: the first document has more bytes"):
        encoding_for("bpe_300", Path("data/corpus"), VocabularyConfig(train_bytes=1))


def test_the_command_line_writes_the_vocabulary(workspace, capsys):
    bpe.main(["--size", "600", "--train_bytes", "10000000", "--out", "out"])
    expected = encoding_for("bpe_600", Path("data/corpus"), VocabularyConfig(**VOCABULARY))
    assert ranked_tokens(encoding_of(Path("out"))) == ranked_tokens(expected)
    assert json.loads(capsys.readouterr().out).keys() == {"seconds", "peak_memory_gib"}
    with pytest.raises(SystemExit, match=r"bpe: a vocabulary of 99 tokens lacks some"):
        bpe.main(["--size", "99", "--train_bytes", "10000000", "--out", "out"])
