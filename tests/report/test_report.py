"""The report of an invented run: missing figures are named, tables are whole, and the page stands alone."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gpt2.pipeline.files import UserError, write_csv, write_json
from gpt2.report.document import write_report
from gpt2.report.figures import FIGURES, TIMED_FIGURES
from gpt2.report.markdown import literal, number, table, to_html
from gpt2.report.results import stage_of
from gpt2.report.sections import describe_heads, describe_norms, describe_training
from gpt2.report.vocabulary_section import describe_vocabularies
from stages import report
from tests.closure import ROOT
from tests.invented_run import LAYER_COLUMNS, break_off, invent_run, load_weights, set_metric, set_norm_study

LINKS = {name: f"plots/report/{name}.png" for name in FIGURES | TIMED_FIGURES}


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("train.val_loss", "train"),
        ("heads.redundant_pairs", "head-similarity"),
        ("norm_study.unigram_val_loss", "norm-study"),
    ],
)
def test_a_missing_metric_is_named_with_file_key_and_stage(tmp_path, missing, stage):
    results = invent_run(tmp_path)
    stem, key = missing.split(".")
    path = tmp_path / "metrics" / f"{stem}.json"
    write_json(path, {name: value for name, value in json.loads(path.read_text()).items() if name != key})
    with pytest.raises(UserError, match=rf"metrics/{stem}.json lacks the key {key}.*{stage}"):
        write_report(results, LINKS)


def test_missing_files_columns_and_rows_are_named(tmp_path):
    results = invent_run(tmp_path)
    write_csv(tmp_path / "plots/prune/frontier.csv", ("heads_removed",), [])
    with pytest.raises(UserError, match=r"plots/prune/frontier.csv lacks the column params"):
        write_report(results, LINKS)
    (tmp_path / "plots/head_similarity/layers.csv").unlink()
    with pytest.raises(UserError, match=r"plots/head_similarity/layers.csv does not exist.*head-similarity"):
        write_report(results, LINKS)
    (tmp_path / "metrics/tokens.json").unlink()
    with pytest.raises(UserError, match=r"metrics/tokens.json does not exist"):
        write_report(results, LINKS)
    write_csv(tmp_path / "plots/train/eval.csv", ("tokens", "val_loss"), [])
    with pytest.raises(UserError, match=r"plots/train/eval.csv has no rows"):
        results.table("train/eval.csv", ["val_loss"])


def change_runs(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = root / "plots/tokenizer/runs_table.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


def test_the_choice_of_gpt2_is_told_as_measured(tmp_path):
    results = invent_run(tmp_path)
    text = describe_vocabularies(results, LINKS)
    assert "those learned here 2.524 (bpe_16384) to 3.101: smaller is better here" in text
    assert "The best size is 4,096 at the smallest budget and 16,384 at the largest; the reference run spends" in text
    assert "40,000 bytes of held-out documents, 900 of them in rare words" in text
    # A model that is no better than guessing has learned nothing.
    assert "the vocabulary's and not the model's" not in text
    change_runs(tmp_path, lambda runs: runs.assign(rare_even_bits_per_byte=1.0))
    assert "the vocabulary's and not the model's" in describe_vocabularies(results, LINKS)
    # With one budget there is nothing to compare.
    change_runs(tmp_path, lambda runs: runs[runs["budget"] == runs["budget"].max()])
    assert "The best size is 16,384 at every budget" in describe_vocabularies(results, LINKS)


def test_small_models_that_diverged_are_told_without_a_figure(tmp_path):
    results = invent_run(tmp_path)
    keys = [column for column in results.table("tokenizer/runs_table.csv", []) if "bits_per_byte" in column]
    lost = [key for key in keys if "even" not in key]
    change_runs(tmp_path, lambda runs: runs.assign(**{key: math.inf for key in lost}))
    text = describe_vocabularies(results, LINKS)
    assert "every run diverged" in text and "n/a (n/a to n/a)" in text
    FIGURES["vocabulary_runs"](results)


def test_stages_are_named_as_in_the_pipeline():
    assert stage_of(Path("metrics/tokens.json")) == "tokenize"
    assert stage_of(Path("plots/tokenizer/examples.csv")) == "tokenizer-study"
    assert stage_of(Path("plots/head_similarity/pairs.csv")) == "head-similarity"


def test_every_markdown_table_has_as_many_cells_in_each_row_as_in_its_head(tmp_path):
    lines = write_report(invent_run(tmp_path), LINKS).splitlines()
    width, n_tables = 0, 0
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith("|"):
            width = 0
            continue
        if re.fullmatch(r"\|( :?--:? \|)+", below):
            width, n_tables = line.count("|"), n_tables + 1
        assert line.count("|") == width
    assert n_tables == 16


def test_the_stage_writes_a_page_that_stands_alone(tmp_path, monkeypatch):
    invent_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    report.main()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(LINKS)
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page and "@import" not in page
    assert "<b>" not in page and "&#60;b&#62;view" in page
    assert '<td style="text-align: left;">nan</td>' in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all((tmp_path / link).is_file() for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text))
    assert json.loads((tmp_path / "metrics/speed/report.json").read_text())["seconds"] > 0


def test_all_but_the_last_section_is_free_of_measured_times(tmp_path):
    results = invent_run(tmp_path)
    before = write_report(results, LINKS).split("## Measured times")
    set_metric(tmp_path, "speed/train.seconds", 1234.5)
    after = write_report(results, LINKS).split("## Measured times")
    assert before[0] == after[0] and before[1] != after[1]


def test_a_diverged_run_is_told(tmp_path):
    results = invent_run(tmp_path, norm="postln")
    break_off(tmp_path)
    text = write_report(results, LINKS)
    assert "norm `postln`" in text and "10.90 nats against 7.100, diverged" in text
    assert "| 0.001 | 10 | postln | 2 | n/a | 4.100 | 4.100 | 0 | 2 | 40 | 0 |" in text
    assert "0.001 with 10 warm-up steps: 2 of 2 runs diverged" in text
    assert "HellaSwag accuracy rises along training | 1 of the 3 evaluations needed" in text


def test_failures_of_a_norm_are_told_by_setting_with_what_rescues_them(tmp_path):
    results = invent_run(tmp_path)
    assert describe_norms(results, LINKS).split("\n\n")[1].splitlines() == [
        "- **preln**: all runs learn in 4 of 4 settings, without a spike.",
        "- **postln**: all runs learn in 3 of 4 settings. In trouble at a learning rate of",
        "    - 0.003 without warm-up: 2 of 2 runs stalled; a longer warm-up (0.003 with 10 warm-up steps) rescues "
        "2 of 2; a lower learning rate (0.001 without warm-up) rescues 2 of 2.",
        "    - 0.003 with 10 warm-up steps: 2 spikes, all runs learn.",
        "- **deepnorm**: all runs learn in 4 of 4 settings, without a spike.",
    ]


def test_a_cure_that_helps_some_runs_or_none_is_told_as_such(tmp_path):
    results = invent_run(tmp_path)
    set_norm_study(tmp_path, "postln", (3e-3, 10), diverged=1, loss_spikes=1)
    set_norm_study(tmp_path, "postln", (1e-3, 0), stalled=2)
    text = describe_norms(results, LINKS)
    cures = "a longer warm-up (0.003 with 10 warm-up steps) rescues 1 of 2; a lower learning rate does not help."
    assert f"0.003 without warm-up: 2 of 2 runs stalled; {cures}" in text
    assert "0.003 with 10 warm-up steps: 1 of 2 runs diverged, 1 spike; a lower learning rate (0.001 with" in text
    # No lower learning rate was tried.
    assert "0.001 without warm-up: 2 of 2 runs stalled; a longer warm-up (0.001 with 10 warm-up steps) rescues" in text


def test_the_norms_stand_together_at_each_setting(tmp_path):
    lines = [line for line in describe_norms(invent_run(tmp_path), LINKS).splitlines() if line.startswith("| 0.")]
    cells = [line.split(" | ")[:3] for line in lines]
    assert cells == [
        [f"| {lr}", warmup, norm]
        for lr in ("0.001", "0.003")
        for warmup in ("0", "10")
        for norm in ("preln", "postln", "deepnorm")
    ]


def test_the_layers_are_told_as_last_logged(tmp_path):
    results = invent_run(tmp_path)
    rows = [(0, -1, 9.0, 9.0), (0, 0, 9.0, 9.0), (50, -1, 5.0, 0.1), (50, 0, 0.25, 0.5), (50, 1, 0.125, 2.0)]
    write_csv(tmp_path / "plots/train/layers.csv", LAYER_COLUMNS, rows)
    text = describe_training(results, LINKS)
    assert "At step 50 the gradient norm of a block is between 0.1250 (layer 1) and 0.2500 (layer 0)" in text
    assert "goes from 0.5000 after the first block to 2.000 after the last" in text
    load_weights(tmp_path)
    assert "At step" not in describe_training(results, LINKS)


@pytest.mark.parametrize(
    ("text", "untrained", "shuffled", "verdict"),
    [
        (0, 0, 0, "Against the reference's claim**: no pair"),
        (3, 3, 0, "Against the reference's claim**: such pairs exist, but"),
        (3, 2, 3, "For the reference's claim with a reserve**"),
        (3, 2, 2, "For the reference's claim**: there are more"),
    ],
)
def test_similar_heads_are_weighed_against_both_nulls(tmp_path, text, untrained, shuffled, verdict):
    results = invent_run(tmp_path)
    for key, value in {"": text, "untrained_": untrained, "shuffled_": shuffled}.items():
        set_metric(tmp_path, f"heads.{key}redundant_pairs", value)
    assert f"**{verdict}" in describe_heads(results, LINKS)


def test_heads_are_told_with_clusters_circuits_and_what_the_nulls_would_have(tmp_path):
    results = invent_run(tmp_path)
    set_metric(tmp_path, "heads.pairs_above_shuffled_threshold", 9)
    layers = results.table("head_similarity/layers.csv", [])
    layers["clusters"] = ["0+1 3+4+5", None, None, None]
    layers.to_csv(tmp_path / "plots/head_similarity/layers.csv", index=False)
    text = describe_heads(results, LINKS)
    assert "| 0+1 3+4+5 |" in text and text.count("| – |") == 3
    # 5 % of 4 times 28 pairs.
    assert "9 pairs lie above them, and 5.6 would" in text and "for W_QK" in text
    assert all(f"{name}.png" in text for name in ("heads", "head_layers", "head_nulls"))


def test_loaded_weights_are_told_from_trained_ones(tmp_path):
    results = invent_run(tmp_path)
    assert "trained from scratch" in write_report(results, LINKS)
    load_weights(tmp_path)
    results.settings["train"]["init_from"] = "models/openai"
    text = write_report(results, LINKS)
    assert text.count("loaded from `models/openai` (sha256 `0123abcd`)") == 2 and "trained from scratch" not in text
    assert "No step was taken" in text and "loss spikes. " not in text and "cannot be tested at this scale with" in text
    set_metric(tmp_path, "train.init_commit", "4c0ffee")
    assert "loaded from `models/openai`, commit `4c0ffee` (sha256" in write_report(results, LINKS)
    assert not [link for link in FIGURES if link != "layers" and f"{link}.png" not in text]


def test_recovery_training_is_told_where_there_was_any(tmp_path):
    results = invent_run(tmp_path)
    assert "steps of training took" not in write_report(results, LINKS)
    for key, value in {"recovery_steps": 50, "pruned_perplexity_before_recovery": 33.0}.items():
        set_metric(tmp_path, f"prune.{key}", value)
    assert "50 steps of training took the saved model from a perplexity of 33.00 to 30.50." in write_report(
        results, LINKS
    )


def test_the_memory_of_pruned_models_is_told_where_a_gpu_measured_it(tmp_path):
    results = invent_run(tmp_path)
    assert "Peak memory (GiB) | Weights" not in write_report(results, LINKS)
    for name in {key.removesuffix("_decode_tokens_per_s") for key in results.speed("prune") if "decode_tok" in key}:
        set_metric(tmp_path, f"speed/prune.{name}_peak_memory_gib", 1.25)
    text = write_report(results, LINKS)
    assert "Peak memory (GiB) | Weights and cache" in text and "| 1.250 | 9.537 |" in text


def test_the_report_is_made_without_torch():
    code = "import sys, stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(124_439_808, "124,439,808"), (3.29243, "3.292"), (12345.6, "12,346"), (0.25, "0.2500"), (0.0003, "3.0e-04"),
     (0.0, "0"), (math.nan, "n/a"), (-71.234, "-71.23"), (np.int64(1024), "1,024")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


def test_cells_and_literal_text_cannot_break_out():
    assert table(("a", "b"), [("x|y", "1\n2")], "lr").splitlines()[2] == "| x&#124;y | 1 2 |"
    page = to_html(literal("*no* _emphasis_ <script>alert(1)</script> [link](http://x) `code`"), "t", Path("."))
    body = page.split("<body>")[1]
    assert not re.search("<(em|script|a|code)", body)
