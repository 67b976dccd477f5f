"""Tables and figures of the norm study, and the test that compares how often Pre-LN and Post-LN fail."""

import math

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from gpt2.norm_study.study import MAIN, NormStudyConfig, StudyData

SETTING = ["arm", "norm", "max_lr", "warmup_steps"]
# How several runs become a row: name of the column, what it is made of, and how.
OUTCOMES = {
    "val_loss": ("val_loss", "mean"),
    "val_loss_sd": ("val_loss", "std"),
    "val_loss_low": ("val_loss", "min"),
    "val_loss_high": ("val_loss", "max"),
    "loss_spikes": ("loss_spikes", "sum"),
    "diverged": ("diverged", "sum"),
    "diverged_at_step": ("diverged_at_step", "min"),
    "stalled": ("stalled", "sum"),
    "max_grad_norm": ("max_grad_norm", "max"),
}
# JSON has no infinity: its figures stop at this loss in nats and this L2 norm of all gradients.
LOSS_CAP, GRAD_NORM_CAP = 1e4, 1e9


def tabulate_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm, norm, learning rate and warm-up of `runs`.

    The validation loss is the mean over seeds, with standard deviation, lowest and highest; what is not a number counts
    as infinite. Spikes, `diverged` and `stalled` are summed; the step is that of the earliest divergence, the gradient
    norm the largest. Cosine and gradient ratio are means over the runs that have one.
    """
    means = {name: (name, "mean") for name in ("token_cosine", "grad_ratio")}
    runs = runs.fillna({"val_loss": math.inf})
    return _aggregate(runs, SETTING, seeds=("seed", "size"), **OUTCOMES, **means).reset_index()


def _aggregate(runs: pd.DataFrame, keys: list[str], /, **columns: tuple[str, str]) -> pd.DataFrame:
    """A row for each group; the step is -1 without a divergence, a gradient norm that is not a number is infinite."""
    runs = runs.assign(
        diverged_at_step=runs["diverged_at_step"].where(runs["diverged"] > 0),
        max_grad_norm=runs["max_grad_norm"].fillna(math.inf),
    )
    table = runs.groupby(keys, sort=False).agg(**columns)
    return table.fillna({"diverged_at_step": -1}).astype({"diverged_at_step": int})


def average_curves(curves: pd.DataFrame, config: NormStudyConfig, quantity: str) -> pd.DataFrame:
    """`quantity` ("loss" or "grad_norm") of each norm by step, in the main arm at its lowest learning rate and longest
    warm-up: the mean over the seeds that have not diverged by then, empty where all have."""
    arm = config.arms[MAIN]
    setting = {"arm": MAIN, "max_lr": min(arm.max_lrs), "warmup_steps": max(arm.warmup_steps)}
    chosen = curves[(curves[[*setting]] == pd.Series(setting)).all(axis=1)]
    wide = chosen.pivot_table(quantity, "step", "norm").reindex(columns=[*config.norms])
    return wide.astype(object).where(wide.notna(), "").reset_index()


def study_figures(runs: pd.DataFrame, config: NormStudyConfig, data: StudyData) -> dict[str, float]:
    """Figures of metrics/norm_study.json; those of a norm and the p-values are over all runs of the main arm.

    The loss is the mean over finite runs, its standard deviation absent if there are fewer than two. `rough_runs`
    spiked or diverged, `lost_runs` diverged or stalled; `diverged` and `stalled` count runs too.
    """
    arm = config.arms[MAIN]
    figures = {
        "runs": len(runs),
        "seeds": len(arm.seeds),
        "settings": len(arm.max_lrs) * len(arm.warmup_steps),
        "vocab_size": config.vocab_size,
        "unigram_entropy": data.unigram_entropy,
        "unigram_val_loss": data.unigram_val_loss,
    }
    runs = runs[runs["arm"] == MAIN]
    runs = runs.assign(
        val_loss=runs["val_loss"].where(np.isfinite(runs["val_loss"])),
        rough=(runs["loss_spikes"] > 0) | (runs["diverged"] > 0),
        lost=(runs["diverged"] > 0) | (runs["stalled"] > 0),
    )
    counts = {"runs": ("seed", "size"), "rough_runs": ("rough", "sum"), "lost_runs": ("lost", "sum")}
    norms = _aggregate(runs, ["norm"], **OUTCOMES, **counts).drop(columns=["val_loss_low", "val_loss_high"])
    norms["val_loss"] = norms["val_loss"].fillna(math.inf).clip(upper=LOSS_CAP)
    norms["max_grad_norm"] = norms["max_grad_norm"].clip(upper=GRAD_NORM_CAP)
    for norm, row in norms.to_dict("index").items():
        figures |= {f"{norm}_{key}": value for key, value in row.items() if not math.isnan(value)}
    if {"preln", "postln"} <= {*config.norms}:
        for kind in ("rough", "lost"):
            figures[f"postln_{kind}_cmh_p"] = compare_failures(runs.assign(failed=runs[kind]))
    return figures


def compare_failures(runs: pd.DataFrame) -> float:
    """p-value of the exact, one-sided Cochran-Mantel-Haenszel test of "Post-LN fails no more often than Pre-LN".

    `runs` has the columns norm, max_lr, warmup_steps and failed; each learning rate and warm-up is a stratum. If the
    norm does not matter, the failures of Post-LN in a stratum are hypergeometric given those of both norms. The p-value
    is the probability that their sum over strata is at least the observed one (Mehta, Patel & Gray 1985, for 2 × 2
    tables); it is 1 if every stratum has only failures or none.
    """
    observed, chances = 0, np.ones(1)
    for _, stratum in runs[runs["norm"].isin(["preln", "postln"])].groupby(["max_lr", "warmup_steps"]):
        postln = stratum["norm"] == "postln"
        observed += int(stratum["failed"][postln].sum())
        failures = hypergeom(len(stratum), int(stratum["failed"].sum()), int(postln.sum()))
        chances = np.convolve(chances, failures.pmf(np.arange(postln.sum() + 1)))
    # Rounding may exceed 1.
    return min(1.0, float(chances[observed:].sum()))
