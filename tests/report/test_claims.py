"""Verdicts turn where a figure crosses its bound, on all models, and only there."""

import math
from pathlib import Path

import pandas as pd
import pytest

from gpt2.pipeline.files import read_json, write_csv, write_json
from gpt2.report.claims import CHECKS, CLAIMS, judge
from gpt2.report.results import Results
from tests.invented_run import break_off, invent_run, load_weights, set_metric, set_models, set_norm_study


@pytest.fixture
def results(tmp_path) -> Results:
    return invent_run(tmp_path)


def test_every_claim_passes_where_every_figure_holds(tmp_path):
    results = invent_run(tmp_path, scale="full")
    verdicts = {key: judge(key, results)[0] for key in CLAIMS.index}
    assert {key for key, verdict in verdicts.items() if verdict not in ("passed", "by construction")} == set()


def test_every_check_belongs_to_one_claim():
    assert sorted(CLAIMS.index) == sorted(CHECKS)


@pytest.mark.parametrize(
    ("key", "metric", "holds", "breaks"),
    [
        ("parameters", "train.n_params", 124_439_808, 124_439_809),
        ("corpus", "tokens.tokens_train", 9_500_000_000, 9_499_999_999),
        ("split", "prepare.documents_val", 150, 156),
        ("held_out", "tokens.benchmark_items_in_train", 0, 1),
        ("steps", "train.steps", 95_365, 95_364),
        ("steps", "train.tokens_per_step", 524_288, 491_520),
        ("learns", "train.val_loss", 7.09, 7.1),
        ("converges", "train.val_loss_late_fall_percent", 0.99, 1.0),
        ("converges", "train.stalled", 0, 1),
        ("converges", "train.diverged", 0, 1),
        ("reproduces", "train.val_loss", 3.2923, 3.2924),
        ("hellaswag_rises", "train.hellaswag_first_acc_norm", 0.27, 0.28),
        ("hellaswag_rises", "train.hellaswag_rank_correlation", 0.01, -0.01),
        ("hellaswag_rises", "hellaswag.completion_acc_norm_stderr", 0.007, 0.008),
        ("hellaswag_above_chance", "hellaswag.completion_acc_norm", 0.2639, 0.2637),
        ("hellaswag_above_chance", "hellaswag.completion_acc_norm_stderr", 0.016, 0.017),
        ("shuffling", "train.windows_in_same_place", 10, 11),
        ("flash_attention", "train.attention_backend", "flash_cpu", "math"),
        ("similar_heads", "heads.redundant_pairs", 1, 0),
        # Of 112 pairs of the null model itself 6 are above its 95 % point.
        ("similarity_learned", "heads.pairs_above_untrained_centred_threshold_percent", 700 / 112, 600 / 112),
        ("similarity_from_text", "heads.pairs_above_shuffled_centred_threshold_percent", 700 / 112, 600 / 112),
        ("similarity_in_middle", "heads.redundant_pairs_middle_percent", 50.1, 50.0),
        ("similarity_in_middle", "heads.middle_layers_percent", 60.0, 75.0),
        ("prune_redundancy", "prune.perplexity_rise_percent_at_15", 4.99, 5.0),
        ("prune_taylor_iterative", "prune.taylor_iterative_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("prune_loss", "prune.loss_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("prune_taylor", "prune.taylor_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("prune_magnitude", "prune.magnitude_perplexity_rise_percent_at_15", 4.99, 5.0),
        ("repair", "prune.max_pruned_percent_below_5", 18.75, 20.0),
        ("redundancy_chooses", "prune.matched_random_sets_perplexity_rise_percent_at_15", 3.2, 3.1),
        ("similarity_chooses", "prune.random_sets_perplexity_rise_percent_at_15", 2.1, 1.9),
        ("postln_rough", "norm_study.postln_rough_cmh_p", 0.05, 0.06),
        ("postln_lost", "norm_study.postln_lost_cmh_p", 0.05, 0.06),
        ("gpu_hours", "speed/train.seconds", 46 * 3600, 46 * 3600 + 1),
        ("gpu_hours", "speed/train.processes", 2, 1),
    ],
)  # fmt: skip
def test_a_verdict_turns_where_its_figure_crosses_the_bound(tmp_path, key, metric, holds, breaks):
    results = invent_run(tmp_path, scale="full")
    set_metric(tmp_path, metric, holds)
    assert judge(key, results)[0] == "passed"
    set_metric(tmp_path, metric, breaks)
    # A p-value above the limit shows no difference, but also not that there is none.
    assert judge(key, results)[0] == ("undecided" if metric.endswith("_p") else "failed")


@pytest.mark.parametrize(
    ("key", "metric", "values"),
    [
        ("prune_redundancy", "prune.perplexity_rise_percent_at_15", [3.0, 5.5, 4.0]),
        ("redundancy_chooses", "prune.perplexity_rise_percent_at_15", [3.0, 9.0, 5.0]),
        ("similar_heads", "heads.redundant_pairs", [0, 3, 5]),
        ("converges", "train.stalled", [0, 1, 0]),
        ("hellaswag_above_chance", "hellaswag.completion_acc_norm", [0.26, 0.30, 0.24]),
        ("similarity_learned", "heads.pairs_above_untrained_centred_threshold_percent", [4.0, 9.0, 6.0]),
        ("similarity_chooses", "prune.random_sets_perplexity_rise_percent_at_15", [1.0, 3.0, 2.0]),
    ],
)
def test_models_that_disagree_leave_a_claim_undecided(tmp_path, results, key, metric, values):
    set_models(tmp_path, metric, values)
    verdict, measured = judge(key, results)
    assert verdict == "undecided" and "± " in measured


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(3.0, 4.9, "passed"), (4.0, 6.0, "undecided"), (5.1, 6.0, "failed")]
)
def test_one_model_is_judged_by_its_interval_and_says_so(tmp_path, results, low, high, verdict):
    key = "prune.perplexity_rise_percent_at_15"
    for name, value in {key: (low + high) / 2, f"{key}_low": low, f"{key}_high": high}.items():
        set_metric(tmp_path, name, value)
    set_models(tmp_path, "seed", [1337])
    verdict, measured = judge("prune_redundancy", results)
    assert verdict == verdict and "(one model)" in measured


@pytest.mark.parametrize(
    ("key", "metric", "sets", "verdicts"),
    [
        # One choice against its layer-matched sets, at 5 %.
        ("redundancy_chooses", "prune.cheaper_matched_random_sets_at_15", 19, ["passed", "failed"]),
        ("redundancy_chooses", "prune.cheaper_matched_random_sets_at_15", 18, ["untested", "untested"]),
        # The best of six orders, at 5 % over six.
        ("similarity_chooses", "prune.similarity_ov_cheaper_random_sets_at_15", 299, ["passed", "passed"]),
        ("similarity_chooses", "prune.similarity_ov_cheaper_random_sets_at_15", 119, ["passed", "failed"]),
        ("similarity_chooses", "prune.similarity_ov_cheaper_random_sets_at_15", 118, ["untested", "untested"]),
    ],
)
def test_random_sets_decide_on_one_model_only_if_there_are_enough(tmp_path, results, key, metric, sets, verdicts):
    for order in ("", "similarity_pattern_nosink_", "similarity_output_", "similarity_written_", "similarity_qk_"):
        set_metric(tmp_path, f"prune.{order}cheaper_random_sets_at_15", 90)
    for name in ("prune.random_sets", "prune.matched_random_sets_at_15"):
        set_metric(tmp_path, name, sets)
    set_models(tmp_path, "seed", [1337])
    for cheaper, verdict in enumerate(verdicts):
        set_metric(tmp_path, metric, cheaper)
        assert judge(key, results)[0] == verdict


def test_too_few_similar_pairs_do_not_show_their_layers(tmp_path, results):
    set_models(tmp_path, "heads.redundant_pairs", [6, 6, 7])
    verdict, measured = judge("similarity_in_middle", results)
    assert verdict == "untested" and "19 pairs in all models" in measured


@pytest.mark.parametrize(
    ("rows", "changes", "verdict"),
    [
        ("norm == 'preln'", {}, "passed"),
        ("norm == 'preln'", {"loss_spikes": 1}, "failed"),
        ("norm == 'preln'", {"diverged": 1}, "failed"),
        ("norm == 'preln'", {"stalled": 1}, "failed"),
        ("norm == 'preln'", {"max_grad_norm": 100.5}, "failed"),
        ("norm == 'preln'", {"max_grad_norm": math.nan}, "failed"),
        ("norm == 'preln'", {"max_grad_norm": 99.5}, "passed"),
        # One run of many, and the other arms.
        ("norm == 'preln' and max_lr == 0.001 and warmup_steps == 0 and seed == 1", {"stalled": 1}, "undecided"),
        ("arm != 'main'", {"stalled": 1}, "passed"),
    ],
)
def test_preln_is_smooth_only_without_any_kind_of_trouble(tmp_path, results, rows, changes, verdict):
    set_norm_study(tmp_path, rows, **changes)
    assert judge("preln_smooth", results)[0] == verdict


@pytest.mark.parametrize("norm", ["preln", "postln"])
def test_a_norm_that_was_not_studied_leaves_its_claims_untested(tmp_path, results, norm):
    path = tmp_path / "plots/norm_study/runs.csv"
    runs = pd.read_csv(path)
    runs[runs["norm"] != norm].to_csv(path, index=False)
    metrics = tmp_path / "metrics/norm_study.json"
    write_json(metrics, {key: value for key, value in read_json(metrics).items() if not key.endswith("_cmh_p")})
    verdicts = [judge(key, results)[0] for key in ("preln_smooth", "postln_rough", "postln_lost")]
    assert verdicts == ["untested" if norm == "preln" else "passed", "untested", "untested"]


def test_a_norm_that_never_fails_does_not_fail_more_often(tmp_path, results):
    set_norm_study(tmp_path, "norm == 'postln'", loss_spikes=0)
    assert judge("postln_rough", results)[0] == "failed"
    # A stall is another failure.
    assert judge("postln_lost", results)[0] == "passed"


def set_runs(root: Path, name: str, **columns: float | list[float]) -> None:
    """Change columns of a vocabulary's runs at the largest budget."""
    for file in ("runs", "runs_table"):
        path = root / f"plots/tokenizer/{file}.csv"
        frame = pd.read_csv(path)
        rows = (frame["name"] == name) & (frame["budget"] == frame["budget"].max())
        for column, values in columns.items():
            frame.loc[rows, column] = values if file == "runs" or not isinstance(values, list) else values[0]
        frame.to_csv(path, index=False)


@pytest.mark.parametrize(
    ("key", "column"), [("predicts_text", "bits_per_byte"), ("predicts_rare_words", "rare_bits_per_byte")]
)
def test_a_larger_vocabulary_predicts_better_only_if_seeds_agree(tmp_path, results, key, column):
    runs = results.table("tokenizer/runs.csv", [])
    smallest = runs[(runs["name"] == "bpe_1024") & (runs["budget"] == runs["budget"].max())][column]
    for name, values, verdict in (
        ("gpt2", 99.0, "passed"),
        ("bpe_16384", (smallest - [0.3, -0.3, 0.1]).tolist(), "undecided"),
        ("bpe_16384", (smallest + 0.1).tolist(), "failed"),
        # A run that diverged.
        ("bpe_16384", math.inf, "undecided"),
    ):
        set_runs(tmp_path, name, **{column: values})
        assert judge(key, results)[0] == verdict


def test_a_model_worse_than_guessing_says_nothing_about_rare_words(tmp_path, results):
    set_runs(tmp_path, "bpe_16384", rare_even_bits_per_byte=1.0)
    verdict, measured = judge("predicts_rare_words", results)
    assert verdict == "untested" and "guessing all tokens alike" in measured
    assert judge("predicts_text", results)[0] == "passed"


def test_what_holds_by_construction_is_reported_as_an_effect(tmp_path, results):
    verdict, measured = judge("splits_rare_words", results)
    values = results.table("tokenizer/vocabularies.csv", []).query("name != 'gpt2'")["rare_tokens_per_word"]
    change = 100 * (values.iloc[-1] / values.iloc[0] - 1)
    assert verdict == "by construction" and f"({change:+.1f} %)" in measured
    assert "n_embd of 256 or more" in judge("cheaper_training", results)[1]


def test_a_loss_per_token_of_another_vocabulary_reproduces_nothing(tmp_path):
    results = invent_run(tmp_path, scale="full")
    set_metric(tmp_path, "tokens.encoding", "bpe_50257")
    verdict, measured = judge("reproduces", results)
    assert verdict == "untested" and "nats per token of bpe_50257, another unit" in measured


def test_two_evaluations_do_not_show_a_rise(tmp_path, results):
    set_metric(tmp_path, "train.hellaswag_evaluations", 2)
    assert judge("hellaswag_rises", results)[0] == "untested"
    # A run that broke off was not too short by design.
    break_off(tmp_path)
    assert judge("hellaswag_rises", results)[0] == "failed"


def test_loaded_weights_leave_what_needs_training_untested_and_nothing_else(tmp_path):
    results = invent_run(tmp_path, scale="full")
    load_weights(tmp_path)
    # Figures that a run of no step gives, and that would decide the claims falsely.
    for metric, value in {"train.stalled": 1, "train.windows_in_same_place": 900}.items():
        set_metric(tmp_path, metric, value)
    # One model has too few pairs to show their layers.
    set_metric(tmp_path, "heads.redundant_pairs", 20)
    results.settings["train"]["init_from"] = "models/openai"
    untested = [key for key in CLAIMS.index if judge(key, results)[0] == "untested"]
    assert untested == [
        *("corpus", "held_out", "steps", "learns", "converges", "reproduces", "hellaswag_rises", "shuffling"),
        "gpu_hours",
    ]
    assert all("needs a training run" in judge(key, results)[1] for key in untested)


def test_an_empty_sample_fails_text_generation(tmp_path, results):
    write_csv(tmp_path / "plots/generate/samples.csv", ("prompt", "text"), [("A", "b"), ("C", " ")])
    assert judge("generates", results)[0] == "failed"


def test_a_small_scale_leaves_the_claims_of_the_full_run_untested_but_measured(tmp_path):
    results = invent_run(tmp_path, scale="tiny")
    set_metric(tmp_path, "train.steps", 250)
    verdict, measured = judge("steps", results)
    assert verdict == "untested" and "250 steps" in measured and "needs scale full" in measured
