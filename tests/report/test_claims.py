"""Verdicts turn where a figure crosses its bound, and only there."""

import math
from pathlib import Path

import pandas as pd
import pytest

from gpt2.pipeline.files import write_csv
from gpt2.report.claims import CLAIMS, TIMED_CLAIM, Row, judge
from gpt2.report.measures import rank_correlation, rises
from gpt2.report.results import Results
from tests.invented_run import break_off, invent_run, load_weights, set_metric, set_norm_study, write_evaluations


def find_row(results: Results, sentence: str) -> Row:
    """The judged claim whose sentence holds the words."""
    (claim,) = [claim for claim in (*CLAIMS, TIMED_CLAIM) if sentence in claim.sentence]
    return judge(claim, results)


def test_every_claim_passes_where_every_figure_holds(tmp_path):
    results = invent_run(tmp_path, scale="full")
    rows = [judge(claim, results) for claim in (*CLAIMS, TIMED_CLAIM)]
    assert [row.claim.sentence for row in rows if row.verdict != "passed"] == []


@pytest.mark.parametrize(
    ("sentence", "metric", "holds", "breaks"),
    [
        ("124M parameters", "train.n_params", 124_439_808, 124_439_809),
        ("FineWeb-Edu-10B", "tokens.tokens_train", 9_500_000_000, 9_499_999_999),
        ("1 % validate", "prepare.documents_val", 150, 156),
        ("held out", "tokens.benchmark_items_in_train", 0, 1),
        ("95,365 steps", "train.steps", 95_365, 95_364),
        ("95,365 steps", "train.tokens_per_step", 524_288, 491_520),
        ("converges", "train.val_loss", 7.09, 7.1),
        ("converges", "train.stalled", 0, 1),
        ("converges", "train.diverged", 0, 1),
        ("Reproduces", "train.val_loss", 3.2924, 3.2925),
        ("above chance", "hellaswag.completion_acc_norm", 0.2639, 0.2638),
        ("above chance", "hellaswag.completion_acc_norm_stderr", 0.016, 0.017),
        ("shuffled anew", "train.windows_in_same_place", 10, 11),
        ("FlashAttention", "train.attention_backend", "flash_cpu", "math"),
        ("over 0.85", "heads.redundant_pairs", 1, 0),
        ("similarity is learned", "heads.redundant_pairs", 3, 2),
        ("similarity is learned", "heads.untrained_redundant_pairs", 7, 8),
        ("reading text", "heads.redundant_pairs", 6, 5),
        ("reading text", "heads.shuffled_redundant_pairs", 7, 8),
        ("middle layers", "heads.redundant_pairs_middle_percent", 50.1, 50.0),
        ("middle layers", "heads.middle_layers_percent", 60.0, 75.0),
        ("chosen by redundancy", "prune.perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by iterative", "prune.taylor_iterative_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by greedy loss", "prune.loss_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("better than chance", "prune.similarity_pattern_nosink_cheaper_random_sets_at_15", 0, 1),
        ("chosen by Taylor", "prune.taylor_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by magnitude", "prune.magnitude_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("twice the heads", "prune.max_pruned_percent_below_5", 18.75, 18.76),
        ("which heads to remove", "prune.random_perplexity_rise_percent_at_15", 3.2, 3.1),
        ("DDP", "speed/train.seconds", 46 * 3600, 46 * 3600 + 1),
        ("DDP", "speed/train.processes", 2, 1),
    ],
)  # fmt: skip
def test_a_verdict_turns_where_its_figure_crosses_the_bound(tmp_path, sentence, metric, holds, breaks):
    results = invent_run(tmp_path, scale="full")
    for value, verdict in ((holds, "passed"), (breaks, "failed")):
        set_metric(tmp_path, metric, value)
        assert find_row(results, sentence).verdict == verdict


def test_too_few_random_sets_leave_the_best_similarity_untested(tmp_path):
    results = invent_run(tmp_path)
    # Of ten orders one may be the best of 199 by chance in 5 %.
    set_metric(tmp_path, "prune.random_sets", 198)
    row = find_row(results, "better than chance")
    assert row.verdict == "untested" and "0 of 198 random sets cost less, too few sets to tell" in row.measured
    set_metric(tmp_path, "prune.similarity_pattern_nosink_cheaper_random_sets_at_15", 1)
    assert find_row(results, "better than chance").verdict == "failed"


HIGH, LOW = (3e-3, 10), (1e-3, 0)


@pytest.mark.parametrize(
    ("sentence", "changes", "verdict"),
    [
        ("Pre-LN trains smoothly", [], "passed"),
        ("Pre-LN trains smoothly", [("preln", LOW, {"loss_spikes": 1})], "failed"),
        ("Pre-LN trains smoothly", [("preln", LOW, {"diverged": 1})], "failed"),
        ("Pre-LN trains smoothly", [("preln", LOW, {"stalled": 1})], "failed"),
        # A stall is neither a spike nor a divergence.
        ("spikes or diverges", [("postln", None, {"loss_spikes": 0})], "failed"),
        ("spikes or diverges", [("postln", None, {"loss_spikes": 0}), ("postln", LOW, {"diverged": 1})], "passed"),
        # What Pre-LN does at the same setting counts, and nothing that it does elsewhere.
        ("spikes or diverges", [("preln", HIGH, {"loss_spikes": 1})], "failed"),
        ("spikes or diverges", [("preln", HIGH, {"diverged": 1})], "failed"),
        ("spikes or diverges", [("preln", LOW, {"loss_spikes": 1, "diverged": 1})], "passed"),
        # All runs of Post-LN and none of Pre-LN, and spikes are not asked for.
        ("learns nothing", [("postln", None, {"stalled": 0})], "failed"),
        ("learns nothing", [("postln", None, {"stalled": 1})], "failed"),
        ("learns nothing", [("postln", None, {"stalled": 1, "diverged": 1})], "passed"),
        ("learns nothing", [("preln", (3e-3, 0), {"stalled": 1})], "failed"),
        ("learns nothing", [("preln", LOW, {"stalled": 2}), ("preln", HIGH, {"loss_spikes": 3})], "passed"),
    ],
)
def test_norms_are_compared_setting_by_setting(tmp_path, sentence, changes, verdict):
    results = invent_run(tmp_path)
    for norm, setting, values in changes:
        set_norm_study(tmp_path, norm, setting, **values)
    assert find_row(results, sentence).verdict == verdict


@pytest.mark.parametrize("norm", ["preln", "postln"])
def test_a_norm_that_was_not_studied_leaves_its_claims_untested(tmp_path, norm):
    results = invent_run(tmp_path)
    table = results.table("norm_study/table.csv", [])
    table[table["norm"] != norm].to_csv(tmp_path / "plots/norm_study/table.csv", index=False)
    rows = [find_row(results, sentence) for sentence in ("smoothly", "spikes or diverges", "learns nothing")]
    assert [row.verdict for row in rows] == ["untested" if norm == "preln" else "passed", "untested", "untested"]
    assert all("not studied" in row.measured for row in rows if row.verdict == "untested")


def test_a_stall_is_told_where_spikes_are_asked_for(tmp_path):
    results = invent_run(tmp_path)
    measured = find_row(results, "spikes or diverges").measured
    assert measured == "in 1 of 4 settings (0.003 with 10 warm-up steps); postln stalls, another failure, in 1"
    assert find_row(results, "learns nothing").measured == "in 1 of 4 settings (0.003 without warm-up)"


@pytest.mark.parametrize(
    "column", ["rare_tokens_per_word", "technical_tokens_per_word", "flops_per_byte", "bytes_per_token"]
)
def test_a_vocabulary_claim_fails_on_one_step_in_the_wrong_direction(tmp_path, column):
    results = invent_run(tmp_path)
    claim = next(claim for claim in CLAIMS if f"`{column}`" in claim.rule)
    assert judge(claim, results).verdict == "passed"
    frame = results.table("tokenizer/vocabularies.csv", [])
    frame.loc[1, column] = frame.loc[0, column]
    frame.to_csv(tmp_path / "plots/tokenizer/vocabularies.csv", index=False)
    assert judge(claim, results).verdict == "failed"


def set_runs(root: Path, name: str, **columns: float) -> None:
    """Change columns of a vocabulary's small models at the largest budget."""
    path = root / "plots/tokenizer/runs_table.csv"
    frame = pd.read_csv(path)
    frame.loc[(frame["name"] == name) & (frame["budget"] == frame["budget"].max()), list(columns)] = [*columns.values()]
    frame.to_csv(path, index=False)


@pytest.mark.parametrize(("part", "sentence"), [("", "predicts text better"), ("rare_", "predicts rare words better")])
def test_a_larger_vocabulary_predicts_better_only_beyond_the_spread_of_seeds(tmp_path, part, sentence):
    results = invent_run(tmp_path)
    assert find_row(results, sentence).verdict == "passed"
    low = results.table("tokenizer/runs_table.csv", [])[f"{part}bits_per_byte_low"]
    set_runs(tmp_path, "gpt2", **{f"{part}bits_per_byte_high": 99.0})
    assert find_row(results, sentence).verdict == "passed"
    # The first row of the larger budget is the smallest vocabulary's.
    set_runs(tmp_path, "bpe_16384", **{f"{part}bits_per_byte_high": float(low[4])})
    assert find_row(results, sentence).verdict == "failed"
    set_runs(tmp_path, "bpe_16384", **{f"{part}bits_per_byte_high": math.inf})
    assert find_row(results, sentence).verdict == "failed"


def test_a_loss_per_token_of_another_vocabulary_reproduces_nothing(tmp_path):
    results = invent_run(tmp_path, scale="full")
    assert find_row(results, "Reproduces GPT-2 124M").verdict == "passed"
    set_metric(tmp_path, "tokens.encoding", "bpe_50257")
    row = find_row(results, "Reproduces GPT-2 124M")
    assert row.verdict == "untested" and "nats per token of bpe_50257, another unit" in row.measured


def test_gpt2s_own_vocabulary_does_not_decide_a_vocabulary_claim(tmp_path):
    results = invent_run(tmp_path)
    frame = results.table("tokenizer/vocabularies.csv", [])
    frame.loc[frame["name"] == "gpt2", "bytes_per_token"] = 0.1
    frame.to_csv(tmp_path / "plots/tokenizer/vocabularies.csv", index=False)
    assert find_row(results, "shortens sequences").verdict == "passed"


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([0.25, 0.28, 0.31], "passed"),
        ([0.25, 0.40, 0.26], "failed"),  # ends where it began
        ([0.25, 0.26, 0.27], "failed"),  # by less than two standard errors
        ([0.31, 0.28, 0.25], "failed"),
        ([0.25, 0.31], "untested"),
    ],
)
def test_accuracy_rises_only_beyond_its_noise(tmp_path, accuracies, verdict):
    results = invent_run(tmp_path)
    write_evaluations(tmp_path, [(i, 4096 * i, 5.0, 0.25, value) for i, value in enumerate(accuracies)])
    assert find_row(results, "rises along training").verdict == verdict


def test_a_run_that_broke_off_does_not_rise(tmp_path):
    results = invent_run(tmp_path)
    break_off(tmp_path)
    assert find_row(results, "rises along training").verdict == "failed"


def test_more_items_make_the_same_rise_significant():
    assert rises([0.25, 0.26, 0.27], items=10_042) and not rises([0.25, 0.26, 0.27], items=1000)


def test_rank_correlation_is_one_minus_one_and_zero_at_its_ends():
    assert rank_correlation([1, 2, 5]) == pytest.approx(1)
    assert rank_correlation([5, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([2, 2, 2]) == 0


def test_loaded_weights_leave_what_needs_training_untested_and_nothing_else(tmp_path):
    results = invent_run(tmp_path, scale="full")
    load_weights(tmp_path)
    # Figures that a run of no step gives, and that would decide the claims falsely.
    for metric, value in {"train.stalled": 1, "train.windows_in_same_place": 900}.items():
        set_metric(tmp_path, metric, value)
    results.settings["train"]["init_from"] = "models/openai"
    rows = [judge(claim, results) for claim in (*CLAIMS, TIMED_CLAIM)]
    untested = [row.claim.sentence for row in rows if row.verdict == "untested"]
    assert untested == [row.claim.sentence for row in rows if "needs a training run" in row.measured]
    words = ("FineWeb-Edu-10B", "held out", "95,365", "converges", "Reproduces", "rises", "shuffled", "DDP")
    assert [sentence for sentence in untested if not any(word in sentence for word in words)] == []
    assert len(untested) == len(words)
    assert {row.verdict for row in rows} == {"untested", "passed"}


def test_an_empty_sample_fails_text_generation(tmp_path):
    results = invent_run(tmp_path)
    write_csv(tmp_path / "plots/generate/samples.csv", ("prompt", "text"), [("A", "b"), ("C", " ")])
    assert find_row(results, "generates text").verdict == "failed"


def test_a_small_scale_leaves_the_claims_of_the_full_run_untested_but_measured(tmp_path):
    results = invent_run(tmp_path, scale="tiny")
    set_metric(tmp_path, "train.steps", 250)
    row = find_row(results, "95,365 steps")
    assert row.verdict == "untested" and "250 steps" in row.measured and "needs scale full" in row.measured
