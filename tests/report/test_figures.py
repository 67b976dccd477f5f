"""Figures of small, full and broken-off runs."""

import pytest
from matplotlib.image import imread

from gpt2.report.figures import FIGURES, MAX_STEPS, TIMED_FIGURES, write_figures
from gpt2.report.names import HEADLINES
from gpt2.report.results import Results
from tests.invented_run import break_off, invent_run, load_weights

ALL = FIGURES | TIMED_FIGURES


@pytest.fixture
def results(tmp_path) -> Results:
    return invent_run(tmp_path)


@pytest.mark.parametrize(("n_layer", "n_head"), [(4, 8), (12, 12)])
def test_figures_are_drawn_for_small_and_full_models_and_repeat_byte_for_byte(tmp_path, n_layer, n_head):
    results = invent_run(tmp_path, n_layer=n_layer, n_head=n_head)
    first = {name: path.read_bytes() for name, path in write_figures(results, tmp_path / "first", ALL).items()}
    second = {name: path.read_bytes() for name, path in write_figures(results, tmp_path / "second", ALL).items()}
    assert first == second and set(first) == set(ALL)
    assert b"matplotlib" not in b"".join(first.values()).lower()
    for name in first:
        assert imread(tmp_path / "first" / f"{name}.png").shape[1] == 1200


@pytest.mark.parametrize("change", [break_off, load_weights])
def test_runs_without_a_curve_are_drawn(tmp_path, change):
    results = invent_run(tmp_path, norm="postln")
    change(tmp_path)
    figures = write_figures(results, tmp_path / "figures", ALL)
    assert all(imread(path).min() < 1 for path in figures.values())


def test_the_norm_study_has_panels_for_every_setting_with_the_entropy_among_the_losses(results):
    panels = FIGURES["norm_study"](results).axes
    assert [axes.get_title() for axes in panels] == 2 * ["learning rate 0.001", "learning rate 0.003", "", ""]
    labels = [f"{name}\n{steps} warm-up steps" for name in ("Loss (nats)", "Gradient norm") for steps in (0, 10)]
    assert [axes.get_ylabel() for axes in panels[::2]] == labels
    for i, axes in enumerate(panels):
        levels = [line.get_ydata()[0] for line in axes.lines if line.get_label() == "unigram entropy"]
        assert levels == ([6.8] if i < 4 else []) and axes.get_yscale() == ("linear" if i < 4 else "log")
        # Of three norms and two seeds, the curve and its median.
        assert sum(len(line.get_xdata()) == 120 for line in axes.lines) == 12


def test_norms_that_were_not_studied_are_not_drawn(tmp_path, results):
    table = results.table("norm_study/runs.csv", [])
    table[table["norm"] != "deepnorm"].to_csv(tmp_path / "plots/norm_study/runs.csv", index=False)
    _, labels = FIGURES["norm_study"](results).axes[0].get_legend_handles_labels()
    assert labels == ["preln", "postln", "unigram entropy"]


def test_runs_of_the_norm_study_that_diverged_are_marked_where_they_did(tmp_path, results):
    break_off(tmp_path)
    panels = FIGURES["norm_study"](results).axes
    assert "diverged" in panels[0].get_legend_handles_labels()[1]
    for axes in panels:
        marks = [line.get_xdata() for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
        assert [list(mark) for mark in marks] == [[40], [40]]


def test_a_norm_study_in_which_every_run_diverged_at_once_is_drawn(tmp_path, results):
    folder = tmp_path / "plots/norm_study"
    results.table("norm_study/runs.csv", []).assign(diverged=1, diverged_at_step=0).to_csv(folder / "runs.csv")
    results.table("norm_study/curves.csv", []).head(0).to_csv(folder / "curves.csv")
    for axes in FIGURES["norm_study"](results).axes:
        assert sum(line.get_marker() == "x" and len(line.get_xdata()) for line in axes.lines) == 6


def test_layers_are_drawn_at_the_first_the_last_and_some_steps_between(results):
    panels = FIGURES["layers"](results).axes
    for axes in panels:
        labels = [line.get_label() for line in axes.lines]
        assert len(labels) == MAX_STEPS and (labels[0], labels[-1]) == ("step 0", "step 250")
        assert [text.get_text() for text in axes.get_xticklabels()] == ["emb.", "0", "1", "2", "3"]


@pytest.mark.parametrize(("n_layer", "n_head"), [(2, 2), (5, 3), (12, 12)])
def test_all_heads_are_in_one_picture(tmp_path, n_layer, n_head):
    whole, _ = FIGURES["heads"](invent_run(tmp_path, n_layer=n_layer, n_head=n_head)).axes
    assert whole.images[0].get_array().shape == (n_layer * n_head, n_layer * n_head)
    boundaries = [line.get_ydata()[0] for line in whole.lines[::2]]
    assert boundaries == [n_head * layer - 0.5 for layer in range(1, n_layer)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_model_is_a_point_next_to_the_interval_of_the_mean(tmp_path, results, count):
    models = results.table("replicates/models.csv", []).head(count)
    models.to_csv(tmp_path / "plots/replicates/models.csv", index=False)
    panels = [axes for axes in FIGURES["replicates"](results).axes if axes.get_visible()]
    metrics = [*HEADLINES]
    assert [axes.get_title().replace("\n", " ") for axes in panels] == [HEADLINES[metric] for metric in metrics]
    for axes, metric in zip(panels, metrics, strict=True):
        points = [y for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata()]
        assert points == models[metric].tolist() and len(axes.collections) == (count > 1)


def test_heads_are_drawn_next_to_their_nulls_with_all_thresholds(results):
    for axes, end in zip(FIGURES["head_nulls"](results).axes, ("", "_centred"), strict=True):
        levels = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
        thresholds = [results.value(f"heads.{null}{end}_threshold") for null in ("shuffled", "untrained")]
        assert levels == thresholds + ([] if end else [0.85])
        # 28 pairs of 8 heads in each of 4 layers.
        assert [len(line.get_xdata()) for line in axes.lines].count(4 * 28) == 3


def test_the_loss_is_drawn_with_the_unigram_entropy(results):
    (axes,) = FIGURES["loss"](results).axes
    assert 7.1 in [line.get_ydata()[0] for line in axes.lines if "unigram entropy" in line.get_label()]
