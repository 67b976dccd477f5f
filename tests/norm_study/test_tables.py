"""Tables and figures of the norm study from runs made by hand: each is a grouping of the runs."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gpt2.norm_study.study import NormStudyConfig, StudyData
from gpt2.norm_study.tables import (
    GRAD_NORM_CAP,
    LOSS_CAP,
    average_curves,
    compare_failures,
    study_figures,
    tabulate_settings,
)
from tests.norm_study.test_study import MAIN, NORMS, make_config

DATA = StudyData(torch.empty(0), torch.empty(0), unigram_entropy=3.1, unigram_val_loss=3.0)


def configure(norms: tuple[str, ...] = NORMS, **changed) -> NormStudyConfig:
    return make_config(norms=list(norms), arms={"main": {**MAIN, **changed}})


def make_run(norm: str, max_lr: float, seed: int, val_loss: float, arm: str = "main", **changed) -> dict:
    """A row of runs.csv, without faults unless `changed`."""
    setting = {"arm": arm, "norm": norm, "max_lr": max_lr, "warmup_steps": 5, "seed": seed}
    faults = {"loss_spikes": 0, "diverged": 0, "diverged_at_step": -1, "stalled": 0, "max_grad_norm": 10.0}
    return {**setting, "val_loss": val_loss, **faults, "token_cosine": 0.1 * seed, "grad_ratio": seed, **changed}


POSTLN = [
    make_run("postln", 0.1, 1, 2.8, max_grad_norm=50.0),
    make_run("postln", 0.1, 2, 2.6, max_grad_norm=60.0),
    make_run("postln", 0.2, 1, 2.95, loss_spikes=1, stalled=1),
    make_run("postln", 0.2, 2, 3.6, loss_spikes=1, diverged=1, diverged_at_step=33, max_grad_norm=1e3),
]


def test_the_table_has_mean_and_spread_over_seeds_sums_of_faults_and_the_worst_gradient():
    table = tabulate_settings(pd.DataFrame([*POSTLN, make_run("postln", 0.1, 1, 2.5, arm="muon")]))
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
    runs = pd.DataFrame([*POSTLN, make_run("postln", 0.1, 1, 9.0, arm="muon", diverged=1, diverged_at_step=0)])
    losses = [2.8, 2.6, 2.95, 3.6]
    assert study_figures(runs, configure(("postln",), max_lrs=[0.1, 0.2]), DATA) == {
        **{"runs": 5, "seeds": 2, "settings": 2},
        **{"vocab_size": 40, "unigram_entropy": 3.1, "unigram_val_loss": 3.0},
        "postln_val_loss": pytest.approx(np.mean(losses)),
        "postln_val_loss_sd": pytest.approx(np.std(losses, ddof=1)),
        **{"postln_runs": 4, "postln_loss_spikes": 2, "postln_rough_runs": 2, "postln_max_grad_norm": 1e3},
        **{"postln_diverged": 1, "postln_diverged_at_step": 33, "postln_stalled": 1, "postln_lost_runs": 2},
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinite_in_the_table_and_left_out_or_capped_in_the_figures(value):
    runs = pd.DataFrame(
        [
            make_run("preln", 0.1, 1, value, diverged=1, diverged_at_step=1, max_grad_norm=value),
            make_run("preln", 0.1, 2, 2.5),
            make_run("preln", 0.2, 1, 2.7),
        ]
    )
    config = configure(("preln",), max_lrs=[0.1, 0.2])
    row = tabulate_settings(runs).iloc[0]
    assert (row["val_loss"], row["val_loss_low"], row["val_loss_high"]) == (math.inf, 2.5, math.inf)
    assert (row["diverged"], row["stalled"], row["max_grad_norm"]) == (1, 0, math.inf)
    figures = study_figures(runs, config, DATA)
    assert (figures["preln_val_loss"], figures["preln_max_grad_norm"]) == (pytest.approx(2.6), GRAD_NORM_CAP)
    alone = study_figures(runs[:1], config, DATA)
    assert alone["preln_val_loss"] == LOSS_CAP and "preln_val_loss_sd" not in alone


def make_curve(norm: str, max_lr: float, seed: int, losses: list[float], arm: str = "main") -> pd.DataFrame:
    """Rows of curves.csv; gradient norms are ten times the losses."""
    setting = {"arm": arm, "norm": norm, "max_lr": max_lr, "warmup_steps": 5, "seed": seed}
    values = np.array(losses)
    return pd.DataFrame({**setting, "step": np.arange(1, len(losses) + 1), "loss": values, "grad_norm": 10 * values})


def test_curves_are_means_over_seeds_at_the_lowest_rate_and_longest_warmup_and_empty_after_divergence():
    config = configure(max_lrs=[0.2, 0.1], warmup_steps=[0, 5], seeds=[1, 2])
    curves = pd.concat(
        [
            make_curve("preln", 0.1, 1, [5.0, 4.0, 3.0]),
            make_curve("preln", 0.1, 2, [6.0, 4.0]),
            make_curve("preln", 0.2, 1, [9.0]),
            make_curve("preln", 0.1, 1, [9.0], arm="muon"),
            make_curve("postln", 0.1, 1, [5.5]),
            make_curve("deepnorm", 0.1, 1, []),
        ]
    )
    loss, grad_norm = (average_curves(curves, config, name) for name in ("loss", "grad_norm"))
    assert [*loss.columns] == ["step", *NORMS] == [*grad_norm.columns]
    assert loss.to_numpy().tolist() == [[1, 5.5, 5.5, ""], [2, 4.0, "", ""], [3, 3.0, "", ""]]
    assert grad_norm.to_numpy().tolist()[0] == [1, 55.0, 55.0, ""]


def make_strata(counts: list[tuple[int, int, int, int]]) -> pd.DataFrame:
    """Runs of strata given as (failed, all) of Pre-LN and (failed, all) of Post-LN."""
    return pd.DataFrame(
        (norm, 0.1, warmup, i < failed)
        for warmup, (a, m, b, n) in enumerate(counts)
        for norm, failed, size in (("preln", a, m), ("postln", b, n), ("deepnorm", 1, 2))
        for i in range(size)
    ).set_axis(["norm", "max_lr", "warmup_steps", "failed"], axis=1)


@pytest.mark.parametrize(
    ("strata", "p"),
    [
        # One stratum is Fisher's exact test: all of 3 and none of 3 fail in one of 20 ways.
        ([(0, 3, 3, 3)], 1 / 20),
        # Strata in which both norms fail alike add nothing; the same again multiplies.
        ([(0, 3, 3, 3), (3, 3, 3, 3), (0, 3, 0, 3)], 1 / 20),
        ([(0, 3, 3, 3), (0, 3, 3, 3)], 1 / 400),
        # One failure of four runs in each of two strata, Post-LN's once: at least one of two with chance 1/2 each.
        ([(0, 2, 1, 2), (1, 2, 0, 2)], 3 / 4),
        ([(3, 3, 0, 3)], 1),
        ([(0, 3, 0, 3)], 1),
        ([(3, 3, 3, 3)], 1),
    ],
)
def test_the_comparison_of_failures_equals_a_hand_computation(strata, p):
    assert compare_failures(make_strata(strata)) == pytest.approx(p)
    assert compare_failures(make_strata(strata)) <= 1


def test_the_comparison_of_failures_counts_all_ways_to_give_the_failures_to_runs():
    counts = [(1, 3, 2, 3), (0, 2, 2, 3), (1, 2, 1, 2)]
    ways = [
        [sum(run >= m for run in chosen) for chosen in itertools.combinations(range(m + n), a + b)]
        for a, m, b, n in counts
    ]
    expected = np.mean([sum(parts) >= 5 for parts in itertools.product(*ways)])
    assert compare_failures(make_strata(counts)) == pytest.approx(expected)


@pytest.mark.parametrize(("fault", "rough", "lost"), [("loss_spikes", 1 / 4, 1), ("stalled", 1, 1 / 4)])
def test_the_figures_hold_the_comparison_for_rough_and_for_lost_runs(fault, rough, lost):
    runs = [[make_run("preln", lr, 1, 2.0), make_run("postln", lr, 1, 2.0, **{fault: 1})] for lr in (0.1, 0.2)]
    figures = study_figures(pd.DataFrame(itertools.chain(*runs)), configure(), DATA)
    assert figures["postln_rough_cmh_p"] == pytest.approx(rough)
    assert figures["postln_lost_cmh_p"] == pytest.approx(lost)
