"""Figures of small, full and broken-off runs."""

import pytest
from matplotlib.image import imread

from gpt2.figures import FIGURES, draw_norm_study, write_figures
from tests.invented_run import break_off, invent_run, load_weights


@pytest.mark.parametrize(("n_layer", "n_head"), [(4, 8), (12, 12)])
def test_figures_are_drawn_for_small_and_full_models_and_repeat_byte_for_byte(tmp_path, n_layer, n_head):
    results = invent_run(tmp_path, n_layer=n_layer, n_head=n_head)
    first = {name: path.read_bytes() for name, path in write_figures(results, tmp_path / "first").items()}
    second = {name: path.read_bytes() for name, path in write_figures(results, tmp_path / "second").items()}
    assert first == second and set(first) == set(FIGURES)
    assert b"matplotlib" not in b"".join(first.values()).lower()
    for name in first:
        assert imread(tmp_path / "first" / f"{name}.png").shape[1] == 1200


@pytest.mark.parametrize("change", [break_off, load_weights])
def test_runs_without_a_curve_are_drawn(tmp_path, change):
    results = invent_run(tmp_path, norm="postln")
    change(tmp_path)
    figures = write_figures(results, tmp_path / "figures")
    assert all(imread(path).min() < 1 for path in figures.values())


def test_norms_that_were_not_studied_are_not_asked_for(tmp_path):
    results = invent_run(tmp_path)
    for name in ("runs", "loss", "grad_norm"):
        table = results.table(f"norm_study/{name}.csv", [])
        table = table[table["norm"] != "deepnorm"] if name == "runs" else table.drop(columns="deepnorm")
        table.to_csv(tmp_path / f"plots/norm_study/{name}.csv", index=False)
    _, labels = draw_norm_study(results).axes[0].get_legend_handles_labels()
    assert labels == ["preln", "postln", "unigram entropy"]
