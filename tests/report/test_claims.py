"""Verdicts turn where a figure crosses its bound, on all models, and only there."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from gpt2.pipeline.files import read_json, write_csv, write_json
from gpt2.report.claims import CHECKS, CLAIMS, TIMED_CLAIM, Row, judge
from gpt2.report.results import Results
from tests.invented_run import break_off, invent_run, load_weights, set_metric, set_models, set_norm_study


def find_row(results: Results, sentence: str) -> Row:
    """The judged claim whose sentence holds the words, on the files as they are now."""
    (claim,) = [claim for claim in (*CLAIMS, TIMED_CLAIM) if sentence in claim.sentence]
    return judge(claim, replace(results))


def test_every_claim_passes_where_every_figure_holds(tmp_path):
    results = invent_run(tmp_path, scale="full")
    rows = [judge(claim, results) for claim in (*CLAIMS, TIMED_CLAIM)]
    assert [row.claim.sentence for row in rows if row.verdict not in ("passed", "by construction")] == []


def test_every_check_belongs_to_one_claim():
    keys = [claim.key for claim in (*CLAIMS, TIMED_CLAIM)]
    assert sorted(keys) == sorted(CHECKS) and all(key.isidentifier() for key in keys)


@pytest.mark.parametrize(
    ("sentence", "metric", "holds", "breaks"),
    [
        ("124M parameters", "train.n_params", 124_439_808, 124_439_809),
        ("FineWeb-Edu-10B", "tokens.tokens_train", 9_500_000_000, 9_499_999_999),
        ("1 % validate", "prepare.documents_val", 150, 156),
        ("held out", "tokens.benchmark_items_in_train", 0, 1),
        ("95,365 steps", "train.steps", 95_365, 95_364),
        ("95,365 steps", "train.tokens_per_step", 524_288, 491_520),
        ("frequencies of tokens", "train.val_loss", 7.09, 7.1),
        ("converges", "train.val_loss_late_fall_percent", 0.99, 1.0),
        ("converges", "train.stalled", 0, 1),
        ("converges", "train.diverged", 0, 1),
        ("Reproduces", "train.val_loss", 3.2923, 3.2924),
        ("rises along", "train.hellaswag_first_acc_norm", 0.27, 0.28),
        ("rises along", "train.hellaswag_rank_correlation", 0.01, -0.01),
        ("rises along", "hellaswag.completion_acc_norm_stderr", 0.007, 0.008),
        ("above chance", "hellaswag.completion_acc_norm", 0.2639, 0.2637),
        ("above chance", "hellaswag.completion_acc_norm_stderr", 0.016, 0.017),
        ("shuffled anew", "train.windows_in_same_place", 10, 11),
        ("FlashAttention", "train.attention_backend", "flash_cpu", "math"),
        ("over 0.85", "heads.redundant_pairs", 1, 0),
        # Of 112 pairs of the null model itself 6 are above its 95 % point.
        ("similarity is learned", "heads.pairs_above_untrained_centred_threshold_percent", 700 / 112, 600 / 112),
        ("reading text", "heads.pairs_above_shuffled_centred_threshold_percent", 700 / 112, 600 / 112),
        ("middle layers", "heads.redundant_pairs_middle_percent", 50.1, 50.0),
        ("middle layers", "heads.middle_layers_percent", 60.0, 75.0),
        ("chosen by redundancy", "prune.perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by iterative", "prune.taylor_iterative_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by greedy loss", "prune.loss_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by Taylor", "prune.taylor_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("chosen by magnitude", "prune.magnitude_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("twice the heads", "prune.max_pruned_percent_below_5", 18.75, 20.0),
        ("of a layer to remove", "prune.matched_random_sets_perplexity_rise_percent_at_15", 3.2, 3.1),
        ("better than chance", "prune.random_sets_perplexity_rise_percent_at_15", 2.1, 1.9),
        ("spikes or diverges more", "norm_study.postln_rough_cmh_p", 0.05, None),
        ("learns nothing", "norm_study.postln_lost_cmh_p", 0.05, None),
        ("DDP", "speed/train.seconds", 46 * 3600, 46 * 3600 + 1),
        ("DDP", "speed/train.processes", 2, 1),
    ],
)  # fmt: skip
def test_a_verdict_turns_where_its_figure_crosses_the_bound(tmp_path, sentence, metric, holds, breaks):
    results = invent_run(tmp_path, scale="full")
    set_metric(tmp_path, metric, holds)
    assert find_row(results, sentence).verdict == "passed"
    if breaks is None:
        set_metric(tmp_path, metric, 0.06)
        assert find_row(results, sentence).verdict == "undecided"
        return
    set_metric(tmp_path, metric, breaks)
    assert find_row(results, sentence).verdict == "failed"


@pytest.mark.parametrize(
    ("sentence", "metric", "values"),
    [
        ("chosen by redundancy", "prune.perplexity_rise_percent_at_15", [3.0, 5.5, 4.0]),
        ("of a layer to remove", "prune.perplexity_rise_percent_at_15", [3.0, 9.0, 5.0]),
        ("over 0.85", "heads.redundant_pairs", [0, 3, 5]),
        ("converges", "train.stalled", [0, 1, 0]),
        ("above chance", "hellaswag.completion_acc_norm", [0.26, 0.30, 0.24]),
        ("similarity is learned", "heads.pairs_above_untrained_centred_threshold_percent", [4.0, 9.0, 6.0]),
        ("better than chance", "prune.random_sets_perplexity_rise_percent_at_15", [1.0, 3.0, 2.0]),
    ],
)
def test_models_that_disagree_leave_a_claim_undecided(tmp_path, sentence, metric, values):
    results = invent_run(tmp_path)
    set_models(tmp_path, metric, values)
    row = find_row(results, sentence)
    assert row.verdict == "undecided" and "± " in row.measured


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(3.0, 4.9, "passed"), (4.0, 6.0, "undecided"), (5.1, 6.0, "failed")]
)
def test_one_model_is_judged_by_its_interval_and_says_so(tmp_path, low, high, verdict):
    results = invent_run(tmp_path)
    key = "prune.perplexity_rise_percent_at_15"
    for name, value in {key: (low + high) / 2, f"{key}_low": low, f"{key}_high": high}.items():
        set_metric(tmp_path, name, value)
    set_models(tmp_path, "seed", [1337])
    row = find_row(results, "chosen by redundancy")
    assert row.verdict == verdict and "(one model)" in row.measured


@pytest.mark.parametrize(
    ("sentence", "key", "sets", "verdicts"),
    [
        # One choice against its layer-matched sets, at 5 %.
        ("of a layer to remove", "prune.cheaper_matched_random_sets_at_15", 19, ["passed", "failed"]),
        ("of a layer to remove", "prune.cheaper_matched_random_sets_at_15", 18, ["untested", "untested"]),
        # The best of six orders, at 5 % over six.
        ("better than chance", "prune.similarity_ov_cheaper_random_sets_at_15", 299, ["passed", "passed"]),
        ("better than chance", "prune.similarity_ov_cheaper_random_sets_at_15", 119, ["passed", "failed"]),
        ("better than chance", "prune.similarity_ov_cheaper_random_sets_at_15", 118, ["untested", "untested"]),
    ],
)
def test_random_sets_decide_on_one_model_only_if_there_are_enough(tmp_path, sentence, key, sets, verdicts):
    results = invent_run(tmp_path)
    for order in ("", "similarity_pattern_nosink_", "similarity_output_", "similarity_written_", "similarity_qk_"):
        set_metric(tmp_path, f"prune.{order}cheaper_random_sets_at_15", 90)
    for name in ("prune.random_sets", "prune.matched_random_sets_at_15"):
        set_metric(tmp_path, name, sets)
    set_models(tmp_path, "seed", [1337])
    found = []
    for cheaper in (0, 1):
        set_metric(tmp_path, key, cheaper)
        found.append(find_row(results, sentence).verdict)
    assert found == verdicts


def test_too_few_similar_pairs_do_not_show_their_layers(tmp_path):
    results = invent_run(tmp_path)
    set_models(tmp_path, "heads.redundant_pairs", [6, 6, 7])
    row = find_row(results, "middle layers")
    assert row.verdict == "untested" and "19 pairs in all models" in row.measured


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "passed"),
        ({"loss_spikes": 1}, "failed"),
        ({"diverged": 1}, "failed"),
        ({"stalled": 1}, "failed"),
        ({"max_grad_norm": 100.5}, "failed"),
        ({"max_grad_norm": math.nan}, "failed"),
        ({"max_grad_norm": 99.5}, "passed"),
    ],
)
def test_preln_is_smooth_only_without_any_kind_of_trouble(tmp_path, changes, verdict):
    results = invent_run(tmp_path)
    set_norm_study(tmp_path, "preln", **changes)
    assert find_row(results, "Pre-LN trains smoothly").verdict == verdict


def test_one_run_in_trouble_of_many_decides_nothing(tmp_path):
    results = invent_run(tmp_path)
    path = tmp_path / "plots/norm_study/runs.csv"
    runs = pd.read_csv(path)
    first = runs.index[(runs["norm"] == "preln") & (runs["arm"] == "main")][0]
    runs.loc[first, "stalled"] = 1
    runs.to_csv(path, index=False)
    row = find_row(results, "Pre-LN trains smoothly")
    assert row.verdict == "undecided" and row.measured.startswith("1 of 8 runs in trouble")


@pytest.mark.parametrize("norm", ["preln", "postln"])
def test_a_norm_that_was_not_studied_leaves_its_claims_untested(tmp_path, norm):
    results = invent_run(tmp_path)
    path = tmp_path / "plots/norm_study/runs.csv"
    runs = pd.read_csv(path)
    runs[runs["norm"] != norm].to_csv(path, index=False)
    metrics = tmp_path / "metrics/norm_study.json"
    write_json(metrics, {key: value for key, value in read_json(metrics).items() if not key.endswith("_cmh_p")})
    rows = [find_row(results, sentence) for sentence in ("smoothly", "spikes or diverges", "learns nothing")]
    assert [row.verdict for row in rows] == ["untested" if norm == "preln" else "passed", "untested", "untested"]


def test_a_norm_that_never_fails_does_not_fail_more_often(tmp_path):
    results = invent_run(tmp_path)
    set_norm_study(tmp_path, "postln", loss_spikes=0)
    assert find_row(results, "spikes or diverges").verdict == "failed"
    # A stall is another failure.
    assert find_row(results, "learns nothing").verdict == "passed"


def test_other_arms_of_the_norm_study_decide_nothing(tmp_path):
    results = invent_run(tmp_path)
    path = tmp_path / "plots/norm_study/runs.csv"
    runs = pd.read_csv(path)
    runs.loc[runs["arm"] != "main", "stalled"] = 1
    runs.to_csv(path, index=False)
    assert find_row(results, "smoothly").verdict == "passed"


def set_runs(root: Path, name: str, **columns: float | list[float]) -> None:
    """Change columns of a vocabulary's runs at the largest budget."""
    for file in ("runs", "runs_table"):
        path = root / f"plots/tokenizer/{file}.csv"
        frame = pd.read_csv(path)
        rows = (frame["name"] == name) & (frame["budget"] == frame["budget"].max())
        for column, values in columns.items():
            frame.loc[rows, column] = values if file == "runs" or not isinstance(values, list) else values[0]
        frame.to_csv(path, index=False)


@pytest.mark.parametrize(("part", "sentence"), [("", "predicts text better"), ("rare_", "predicts rare words better")])
def test_a_larger_vocabulary_predicts_better_only_if_seeds_agree(tmp_path, part, sentence):
    results, key = invent_run(tmp_path), f"{part}bits_per_byte"
    assert find_row(results, sentence).verdict == "passed"
    set_runs(tmp_path, "gpt2", **{key: 99.0})
    assert find_row(results, sentence).verdict == "passed"
    runs = results.table("tokenizer/runs.csv", [])
    smallest = runs[(runs["name"] == "bpe_1024") & (runs["budget"] == runs["budget"].max())][key]
    set_runs(tmp_path, "bpe_16384", **{key: (smallest - [0.3, -0.3, 0.1]).tolist()})
    assert find_row(results, sentence).verdict == "undecided"
    set_runs(tmp_path, "bpe_16384", **{key: (smallest + 0.1).tolist()})
    assert find_row(results, sentence).verdict == "failed"
    # Of a run that diverged.
    set_runs(tmp_path, "bpe_16384", **{key: math.inf})
    assert find_row(results, sentence).verdict == "undecided"


def test_a_model_worse_than_guessing_says_nothing_about_rare_words(tmp_path):
    results = invent_run(tmp_path)
    set_runs(tmp_path, "bpe_16384", rare_even_bits_per_byte=1.0)
    row = find_row(results, "predicts rare words better")
    assert row.verdict == "untested" and "guessing all tokens alike" in row.measured
    assert find_row(results, "predicts text better").verdict == "passed"


def test_what_holds_by_construction_is_reported_as_an_effect(tmp_path):
    results = invent_run(tmp_path)
    row = find_row(results, "splits rare words less")
    values = results.table("tokenizer/vocabularies.csv", []).query("name != 'gpt2'")["rare_tokens_per_word"]
    change = 100 * (values.iloc[-1] / values.iloc[0] - 1)
    assert row.verdict == "by construction" and f"({change:+.1f} %)" in row.measured
    assert "n_embd of 256 or more" in find_row(results, "makes training cheaper").measured


def test_a_loss_per_token_of_another_vocabulary_reproduces_nothing(tmp_path):
    results = invent_run(tmp_path, scale="full")
    set_metric(tmp_path, "tokens.encoding", "bpe_50257")
    row = find_row(results, "Reproduces GPT-2 124M")
    assert row.verdict == "untested" and "nats per token of bpe_50257, another unit" in row.measured


def test_two_evaluations_do_not_show_a_rise(tmp_path):
    results = invent_run(tmp_path)
    set_metric(tmp_path, "train.hellaswag_evaluations", 2)
    assert find_row(results, "rises along training").verdict == "untested"
    # A run that broke off was not too short by design.
    break_off(tmp_path)
    assert find_row(results, "rises along training").verdict == "failed"


def test_loaded_weights_leave_what_needs_training_untested_and_nothing_else(tmp_path):
    results = invent_run(tmp_path, scale="full")
    load_weights(tmp_path)
    # Figures that a run of no step gives, and that would decide the claims falsely.
    for metric, value in {"train.stalled": 1, "train.windows_in_same_place": 900}.items():
        set_metric(tmp_path, metric, value)
    # One model has too few pairs to show their layers.
    set_metric(tmp_path, "heads.redundant_pairs", 20)
    results.settings["train"]["init_from"] = "models/openai"
    rows = [judge(claim, results) for claim in (*CLAIMS, TIMED_CLAIM)]
    untested = [row.claim.sentence for row in rows if row.verdict == "untested"]
    assert untested == [row.claim.sentence for row in rows if "needs a training run" in row.measured]
    words = (
        "FineWeb-Edu-10B",
        "held out",
        "95,365",
        "frequencies",
        "converges",
        "Reproduces",
        "rises",
        "shuffled",
        "DDP",
    )
    assert [sentence for sentence in untested if not any(word in sentence for word in words)] == []
    assert len(untested) == len(words)


def test_an_empty_sample_fails_text_generation(tmp_path):
    results = invent_run(tmp_path)
    write_csv(tmp_path / "plots/generate/samples.csv", ("prompt", "text"), [("A", "b"), ("C", " ")])
    assert find_row(results, "generates text").verdict == "failed"


def test_a_small_scale_leaves_the_claims_of_the_full_run_untested_but_measured(tmp_path):
    results = invent_run(tmp_path, scale="tiny")
    set_metric(tmp_path, "train.steps", 250)
    row = find_row(results, "95,365 steps")
    assert row.verdict == "untested" and "250 steps" in row.measured and "needs scale full" in row.measured
