"""The report of an invented run: its structure, the cells of its tables, and its errors."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gpt2.pipeline import stage
from gpt2.pipeline.files import UserError, write_csv, write_json
from gpt2.report import document, tables
from gpt2.report.claims import CLAIMS, TIMED_CLAIM, judge_claims
from gpt2.report.figures import FIGURES, TIMED_FIGURES
from gpt2.report.markdown import literal, number, table, to_html, write_spread
from gpt2.report.results import Results, stage_of
from gpt2.report.tables import write_interval
from stages import report
from tests.invented_run import break_off, invent_run, load_weights, set_metric, set_models, set_norm_study

LINKS = {name: f"plots/report/{name}.png" for name in FIGURES | TIMED_FIGURES}
SECTIONS = [
    *("Results", "Claims", "Replicates", "Training", "Placement of the layer norm", "Size of the vocabulary"),
    *("Similar attention heads", "Pruning of heads", "Generated text", "Setup", "Measured times"),
]


@pytest.fixture
def results(tmp_path) -> Results:
    return invent_run(tmp_path)


def write_report(results: Results) -> str:
    """The report with its claims judged."""
    return document.write_report(results, judge_claims(results), LINKS)


def read_tables(text: str) -> list[pd.DataFrame]:
    """The tables of a Markdown text, with strings as cells. Fails if a row has more or fewer cells than its head."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()] for block in blocks]
    return [pd.DataFrame(cells, columns=head) for head, _, *cells in rows]


def cell(text: str, row: str, column: str) -> str:
    """The cell of the first table that has the column and, in its first one, the name of the row."""
    for found in read_tables(text):
        if column in found and row in found.iloc[:, 0].tolist():
            return found.loc[found.iloc[:, 0] == row, column].iloc[0]
    raise AssertionError(f"no table has the row {row} and the column {column}")


def test_sections_figures_and_claims_are_all_there(results):
    text = write_report(results)
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert sorted(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)) == sorted(LINKS.values())
    judged = pd.concat(found for found in read_tables(text) if "Rule" in found)
    assert sorted(judged["Claim"]) == sorted(CLAIMS["sentence"])
    assert not re.search(r"\n\n\n|[^\S\n]{2}|\{\{|nan\b(?! \|)", text)


@pytest.mark.parametrize(
    ("metric", "value", "row", "column", "written"),
    [
        ("train.val_loss", 3.14159, "Validation loss (nats per token)", "This run", "3.142"),
        ("hellaswag.harness_acc", 0.1234, "HellaSwag harness acc (%)", "This run", "12.34 ± 0.46"),
        ("heads.untrained_redundant_pairs", 17, "untrained, text", "Redundant pairs", "17"),
        ("heads.pairs_above_shuffled_centred_threshold_percent", 19.5, "trained, shuffled tokens",
         "Trained pairs above it (%)", "19.50"),
        ("heads.untrained_max_ov_similarity", 0.4321, "W_OV", "Highest, untrained", "0.4321"),
        ("prune.ov_rank_correlation_in_layer_high", 0.87, "W_OV", "Within layers", "-0.40 [-0.60, +0.87]"),
        ("prune.max_pruned_percent_below_5", 12.5, "redundancy", "Most heads for under 5 % (%)", "12.50"),
        ("prune.similarity_qk_cheaper_matched_random_sets_at_15", 33, "redundancy by W_QK", "Cheaper ones",
         "33 of 199"),
        ("prune.whole_hellaswag_acc_norm", 0.2857, "whole", "acc_norm (%)", "28.57 ± 1.00"),
        ("prune.pruned_perplexity", 99.5, "6, saved model", "Perplexity", "99.50"),
        ("speed/hellaswag.seconds", 12.25, "hellaswag", "Seconds", "12.25"),
    ],
)  # fmt: skip
def test_a_metric_is_in_its_cell(tmp_path, results, metric, value, row, column, written):
    set_metric(tmp_path, metric, value)
    assert cell(write_report(results), row, column) == written


@pytest.mark.parametrize("name", ["train.val_loss", "heads.redundant_pairs", "norm_study.unigram_val_loss"])
def test_a_missing_metric_is_named_with_file_key_and_stage(tmp_path, results, name):
    stem, key = name.split(".")
    path = tmp_path / "metrics" / f"{stem}.json"
    write_json(path, {other: value for other, value in json.loads(path.read_text()).items() if other != key})
    with pytest.raises(
        UserError, match=rf"metrics/{stem}.json .*{key}.*dvc repro .*{stage_of(path.relative_to(tmp_path))}"
    ):
        write_report(results)


def test_missing_files_columns_and_rows_are_named(tmp_path, results):
    for path, change, match in (
        ("plots/prune/frontier.csv", lambda path: write_csv(path, ("heads_removed",), []), "column params"),
        ("plots/head_similarity/layers.csv", Path.unlink, "does not exist.*head-similarity"),
        ("metrics/tokens.json", Path.unlink, "does not exist"),
    ):
        change(tmp_path / path)
        with pytest.raises(UserError, match=f"{path} .*{match}"):
            write_report(results)
    write_csv(tmp_path / "plots/train/eval.csv", ("tokens", "val_loss"), [])
    with pytest.raises(UserError, match=r"plots/train/eval.csv has no rows"):
        results.table("train/eval.csv", ["val_loss"])


def test_stages_are_named_as_in_the_pipeline():
    assert stage_of(Path("metrics/tokens.json")) == "tokenize"
    assert stage_of(Path("plots/tokenizer/examples.csv")) == "tokenizer-study"
    assert stage_of(Path("plots/head_similarity/pairs.csv")) == "head-similarity"


def test_the_summary_counts_verdicts_and_names_each(results):
    claims = judge_claims(results)
    summary = document.summarise_claims(claims)
    verdicts = {key.removeprefix("verdict_"): value for key, value in summary.items() if key.startswith("verdict_")}
    assert verdicts == claims["verdict"].to_dict() and set(verdicts) == set(CLAIMS.index) - {TIMED_CLAIM}
    assert summary["claims_by_construction"] == [*verdicts.values()].count("by construction") == 5
    assert sum(value for key, value in summary.items() if key.startswith("claims_")) == len(verdicts)
    counts = f"{summary['claims_passed']} passed, {summary['claims_untested']} untested, 5 by construction."
    assert counts in write_report(results)


def test_replicates_have_mean_deviation_and_interval(tmp_path, results):
    text = write_report(results)
    assert cell(text, "Validation loss (nats per token)", "Mean ± SD (n)") == "3.2800 ± 0.0010 (3)"
    assert cell(text, "HellaSwag harness acc_norm (%)", "Mean ± SD (n)") == "31 ± 0 (3)"
    assert cell(text, "Validation bits per byte", "95 % interval of the mean") == "0.9852 to 1.035"
    set_models(tmp_path, "seed", [1337])
    text = write_report(results)
    assert cell(text, "Validation loss (nats per token)", "Mean ± SD (n)") == "–"
    assert cell(text, "Pairs of heads above 0.85", "Main model") == "8" and "One model;" in text


def test_a_spread_is_that_of_the_sample():
    assert write_spread(pd.Series([4.17, 4.20, 4.25])) == "4.207 ± 0.040 (3)"
    assert write_spread(pd.Series([1000, 3000])) == "2,000 ± 1,414 (2)"
    assert write_spread(pd.Series([5, 5, 5])) == "5 ± 0 (3)"
    assert write_spread(pd.Series([1.0, math.nan])) == write_interval(pd.Series([1.0, math.nan])) == "–"


def test_the_norm_study_counts_runs_that_learned_at_each_setting(tmp_path, results):
    lost = {"diverged": 1, "diverged_at_step": 7, "val_loss": math.nan, "stalled": 0}
    set_norm_study(tmp_path, "norm == 'postln' and seed == 1", **lost)
    summary = tables.summarise_norms(results).set_index(["Arm", "Learning rate", "Warm-up steps"])
    assert list(summary.columns) == ["preln", "postln", "deepnorm"]
    assert summary["postln"].tolist() == [f"n/a ± – ({learned} of 2)" for learned in (1, 1, 0, 1, 1)]
    assert summary["preln"].iloc[-1] == "4.100 ± 0 (2 of 2)" and summary.index[-1] == ("Muon, tied", "0.001", 10)
    details = tables.tabulate_norms(results)
    assert details["norm"].tolist() == 5 * ["preln", "postln", "deepnorm"]
    assert details["diverged_at_step"].tolist() == 5 * ["–", 7, "–"]


def test_the_best_vocabulary_is_marked_at_each_budget(tmp_path, results):
    runs = tables.tabulate_vocabulary_runs(results)
    assert runs.loc[runs["best"] == "best", "name"].tolist() == ["bpe_4096", "bpe_16384"]
    path = tmp_path / "plots/tokenizer/runs_table.csv"
    lost = {key: math.inf for key in pd.read_csv(path) if "bits_per_byte" in key and "even" not in key}
    pd.read_csv(path).assign(**lost).to_csv(path, index=False)
    runs = tables.tabulate_vocabulary_runs(results)
    assert set(runs["best"]) == {""} and set(runs["rare_words"]) == {"n/a (n/a to n/a)"}
    FIGURES["vocabulary_runs"](results)


@pytest.mark.usefixtures("results")
def test_the_stage_writes_a_page_that_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.main()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(LINKS)
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page and "@import" not in page
    assert "<b>" not in page and "&#60;b&#62;view" in page
    # A word, not a missing value.
    assert '<td style="text-align: left;">nan</td>' in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all((tmp_path / link).is_file() for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text))
    assert json.loads((tmp_path / "metrics/speed/report.json").read_text())["seconds"] > 0
    assert len(re.findall("<table>", page)) == len(read_tables(text))


def test_all_but_the_last_section_is_free_of_measured_times(tmp_path, results):
    before = write_report(results).split("## Measured times")
    set_metric(tmp_path, "speed/train.seconds", 1234.5)
    after = write_report(results).split("## Measured times")
    assert before[0] == after[0] and before[1] != after[1]


def test_the_report_of_a_diverged_run_is_whole(tmp_path):
    results = invent_run(tmp_path, norm="postln")
    break_off(tmp_path)
    text = write_report(results)
    assert "norm `postln`" in text
    assert cell(text, "Validation loss (nats per token)", "This run") == "10.90"
    assert cell(text, "The training converges", "Verdict") == "**failed**"


def test_loaded_weights_are_named_with_their_origin(tmp_path, results):
    assert "weights trained from scratch" in write_report(results)
    load_weights(tmp_path)
    results.settings["train"]["init_from"] = "models/openai"
    text = write_report(results)
    assert text.count("loaded from `models/openai` (sha256 `0123abcd`)") == 2 and "trained from scratch" not in text
    assert [name for name, link in LINKS.items() if link not in text] == ["layers"]
    assert "rest on this one" in text
    set_metric(tmp_path, "train.init_commit", "4c0ffee")
    assert "loaded from `models/openai`, commit `4c0ffee` (sha256" in write_report(results)


def test_recovery_training_is_reported_where_there_was_any(tmp_path, results):
    assert "steps of training after" not in write_report(results)
    for key, value in {"recovery_steps": 50, "pruned_perplexity_before_recovery": 33.0}.items():
        set_metric(tmp_path, f"prune.{key}", value)
    assert "50 steps of training after" in write_report(results)


def test_the_memory_of_pruned_models_is_shown_where_a_gpu_measured_it(tmp_path, results):
    assert "Peak memory (GiB)" not in tables.tabulate_pruned_speed(results)
    for name in {key.removesuffix("_decode_tokens_per_s") for key in results.speed("prune") if "decode_tok" in key}:
        set_metric(tmp_path, f"speed/prune.{name}_peak_memory_gib", 1.25)
    assert set(tables.tabulate_pruned_speed(results)["Peak memory (GiB)"]) == {1.25}


def test_an_edit_of_a_template_is_noticed_while_the_stage_runs():
    assert {"gpt2/report/report.md.j2", "gpt2/report/claims.csv.j2"} <= stage._source_hashes().keys()


@pytest.mark.parametrize(
    ("value", "text"),
    [(124_439_808, "124,439,808"), (3.29243, "3.292"), (12345.6, "12,346"), (0.25, "0.2500"), (0.0003, "3.0e-04"),
     (0.0, "0"), (math.nan, "n/a"), (-71.234, "-71.23"), (np.int64(1024), "1,024")],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_tables_escape_cells_and_align_figures():
    frame = pd.DataFrame({"a": ["x|y", "1\n2"], "b": [1024, 3], "c": ["2.5 ± 0.1 (3)", "–"], "d": [1, "2 of them"]})
    assert table(frame).splitlines() == [
        *("| a | b | c | d |", "|:--|--:|--:|:--|", "| x&#124;y | 1,024 | 2.5 ± 0.1 (3) | 1 |"),
        "| 1 2 | 3 | – | 2 of them |",
    ]
    assert table(frame, {"b": "B"}).splitlines()[0] == "| B |"
    assert table(frame.head(0)[["a"]]).splitlines()[0] == "| a |"


def test_literal_text_is_no_markup():
    page = to_html(literal("*no* _emphasis_ <script>alert(1)</script> [link](http://x) `code`"), "t", Path("."))
    assert not re.search("<(em|script|a|code)", page.split("<body>")[1])
