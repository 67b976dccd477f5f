"""Tables and figures of the norm study from runs made by hand: each is a grouping of the runs."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gpt2.norm_study.study import NormSetting, NormStudyConfig, RunResult, StudyData
from gpt2.norm_study.tables import (
    GRAD_NORM_CAP,
    LOSS_CAP,
    average_curves,
    compare_failures,
    study_figures,
    tabulate_curves,
    tabulate_runs,
    tabulate_settings,
)
from gpt2.train.short_runs import Curve
from tests.norm_study.test_study import MAIN, NORMS, make_config

DATA = StudyData(torch.empty(0), torch.empty(0), vocab_size=200, unigram_entropy=3.1, unigram_val_loss=3.0)
SPIKING = [3.0] * 32 + [9.0, 3.0]


def configure(norms: tuple[str, ...] = NORMS, **changed) -> NormStudyConfig:
    return make_config(norms=list(norms), arms={"main": {**MAIN, **changed}})


def make_result(
    setting: tuple,
    losses: list[float],
    val_loss: float,
    diverged_at_step: int = -1,
    max_grad_norm: float = 0.0,
    arm: str = "main",
) -> RunResult:
    """The run of (norm, learning rate, seed); its largest gradient norm is at least ten times its largest loss."""
    norm, max_lr, seed = setting
    grad_norms = [10 * loss for loss in losses]
    curve = Curve(losses, grad_norms, float(np.max([*grad_norms, max_grad_norm])), diverged_at_step)
    return RunResult(NormSetting(arm, norm, max_lr, 5, seed), curve, val_loss, 0.1 * seed, seed)


def make_postln() -> list[RunResult]:
    return [
        make_result(("postln", 0.1, 1), [5.0, 4.0], 2.8),
        make_result(("postln", 0.1, 2), [6.0, 4.0], 2.6),
        make_result(("postln", 0.2, 1), SPIKING, 2.95),
        make_result(("postln", 0.2, 2), SPIKING[:-1], 3.6, diverged_at_step=33, max_grad_norm=1e3),
    ]


def test_the_table_has_mean_and_spread_over_seeds_sums_of_faults_and_the_worst_gradient():
    results = [*make_postln(), make_result(("postln", 0.1, 1), [5.0], 2.5, arm="muon")]
    table = tabulate_settings(tabulate_runs(results, DATA))
    assert [*table.columns] == [
        *("arm", "norm", "max_lr", "warmup_steps", "seeds", "val_loss", "val_loss_sd", "val_loss_low", "val_loss_high"),
        *("loss_spikes", "diverged", "diverged_at_step", "stalled", "max_grad_norm", "token_cosine", "grad_ratio"),
    ]
    first, second, third = (tuple(row) for row in table.itertuples(index=False))
    spread = [pytest.approx(2.7), pytest.approx(math.sqrt(0.02)), 2.6, 2.8]
    assert first == ("main", "postln", 0.1, 5, 2, *spread, 0, 0, -1, 0, 60.0, pytest.approx(0.15), 1.5)
    assert second[4:5] + second[9:14] == (2, 2, 1, 33, 1, 1e3)
    # One run has no spread.
    assert third[:6] == ("muon", "postln", 0.1, 5, 1, 2.5) and math.isnan(third[6])


def test_the_figures_are_over_all_runs_of_the_main_arm():
    results = [*make_postln(), make_result(("postln", 0.1, 1), SPIKING, 9.0, diverged_at_step=0, arm="muon")]
    figures = study_figures(tabulate_runs(results, DATA), configure(("postln",), max_lrs=[0.1, 0.2]), DATA)
    assert figures == {
        "runs": 5,
        "seeds": 2,
        "settings": 2,
        "vocab_size": 200,
        "unigram_entropy": 3.1,
        "unigram_val_loss": 3.0,
        "postln_val_loss": pytest.approx(np.mean([2.8, 2.6, 2.95, 3.6])),
        "postln_val_loss_sd": pytest.approx(np.std([2.8, 2.6, 2.95, 3.6], ddof=1)),
        "postln_runs": 4,
        "postln_loss_spikes": 2,
        "postln_rough_runs": 2,
        "postln_diverged": 1,
        "postln_diverged_at_step": 33,
        "postln_stalled": 1,
        "postln_lost_runs": 2,
        "postln_max_grad_norm": 1e3,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinite_in_the_table_and_left_out_or_capped_in_the_figures(value):
    results = [
        make_result(("preln", 0.1, 1), [4.0], value, diverged_at_step=1, max_grad_norm=value),
        make_result(("preln", 0.1, 2), [4.0], 2.5),
        make_result(("preln", 0.2, 1), [4.0], 2.7),
    ]
    config = configure(("preln",), max_lrs=[0.1, 0.2])
    runs = tabulate_runs(results, DATA)
    assert runs["val_loss"][0] == pytest.approx(value, nan_ok=True) == runs["max_grad_norm"][0]
    row = tabulate_settings(runs).iloc[0]
    assert (row["val_loss"], row["val_loss_low"], row["val_loss_high"]) == (math.inf, 2.5, math.inf)
    assert (row["diverged"], row["stalled"], row["max_grad_norm"]) == (1, 0, math.inf)
    figures = study_figures(runs, config, DATA)
    assert (figures["preln_val_loss"], figures["preln_max_grad_norm"]) == (pytest.approx(2.6), GRAD_NORM_CAP)
    alone = study_figures(runs[:1], config, DATA)
    assert alone["preln_val_loss"] == LOSS_CAP and "preln_val_loss_sd" not in alone


def test_curves_are_means_over_seeds_at_the_lowest_rate_and_longest_warmup_and_empty_after_divergence():
    config = configure(max_lrs=[0.2, 0.1], warmup_steps=[0, 5], seeds=[1, 2])
    results = [
        make_result(("preln", 0.1, 1), [5.0, 4.0, 3.0], 3.0),
        make_result(("preln", 0.1, 2), [6.0, 4.0], 3.0, diverged_at_step=2),
        make_result(("preln", 0.2, 1), [9.0], 3.0),
        make_result(("preln", 0.1, 1), [9.0], 3.0, arm="muon"),
        make_result(("postln", 0.1, 1), [5.5], 9.0, diverged_at_step=1),
        make_result(("deepnorm", 0.1, 1), [], 9.0, diverged_at_step=0),
    ]
    curves = tabulate_curves(results)
    assert [*curves.columns] == ["arm", "norm", "max_lr", "warmup_steps", "seed", "step", "loss", "grad_norm"]
    assert len(curves) == 8
    loss, grad_norm = (average_curves(curves, config, name) for name in ("loss", "grad_norm"))
    assert [*loss.columns] == ["step", *NORMS] == [*grad_norm.columns]
    assert loss.to_numpy().tolist() == [[1, 5.5, 5.5, ""], [2, 4.0, "", ""], [3, 3.0, "", ""]]
    assert grad_norm.to_numpy().tolist()[0] == [1, 55.0, 55.0, ""]
    assert average_curves(tabulate_curves(results[-1:]), config, "loss").empty


def make_strata(counts: list[tuple[int, int, int, int]]) -> pd.DataFrame:
    """Runs of strata given as (failed, all) of Pre-LN and (failed, all) of Post-LN."""
    return pd.DataFrame(
        (norm, 0.1, warmup, i < failed)
        for warmup, (a, m, b, n) in enumerate(counts)
        for norm, failed, size in (("preln", a, m), ("postln", b, n), ("deepnorm", 1, 2))
        for i in range(size)
    ).set_axis(["norm", "max_lr", "warmup_steps", "failed"], axis=1)


def test_the_comparison_of_failures_equals_a_hand_computation():
    # One stratum is Fisher's exact test: all of 3 and none of 3 fail in one of 20 ways.
    assert compare_failures(make_strata([(0, 3, 3, 3)])) == pytest.approx(1 / 20)
    # A second that both norms fail alike adds nothing; the same again multiplies.
    assert compare_failures(make_strata([(0, 3, 3, 3), (3, 3, 3, 3), (0, 3, 0, 3)])) == pytest.approx(1 / 20)
    assert compare_failures(make_strata([(0, 3, 3, 3), (0, 3, 3, 3)])) == pytest.approx(1 / 400)
    # One failure of four runs in each of two strata, Post-LN's once: at least one of two at a chance of a half each.
    assert compare_failures(make_strata([(0, 2, 1, 2), (1, 2, 0, 2)])) == pytest.approx(3 / 4)
    assert compare_failures(make_strata([(3, 3, 0, 3)])) == pytest.approx(1)
    assert compare_failures(make_strata([(0, 3, 0, 3)])) == compare_failures(make_strata([(3, 3, 3, 3)])) == 1


def test_the_comparison_of_failures_counts_all_ways_to_give_the_failures_to_runs():
    counts = [(1, 3, 2, 3), (0, 2, 2, 3), (1, 2, 1, 2)]
    ways = [
        [sum(run >= m for run in chosen) for chosen in itertools.combinations(range(m + n), a + b)]
        for a, m, b, n in counts
    ]
    sums = [sum(parts) for parts in itertools.product(*ways)]
    expected = np.mean([total >= 5 for total in sums])
    assert compare_failures(make_strata(counts)) == pytest.approx(expected)


@pytest.mark.parametrize(("spikes", "val_loss", "rough", "lost"), [(True, 2.0, 1 / 4, 1), (False, 3.0, 1, 1 / 4)])
def test_the_figures_hold_the_comparison_for_rough_and_for_lost_runs(spikes, val_loss, rough, lost):
    results = [
        result
        for lr in (0.1, 0.2)
        for result in (
            make_result(("preln", lr, 1), [3.0], 2.0),
            make_result(("postln", lr, 1), SPIKING if spikes else [3.0], val_loss),
        )
    ]
    figures = study_figures(tabulate_runs(results, DATA), configure(), DATA)
    assert figures["postln_rough_cmh_p"] == pytest.approx(rough)
    assert figures["postln_lost_cmh_p"] == pytest.approx(lost)
