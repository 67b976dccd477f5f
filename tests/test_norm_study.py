"""The norm study: several workers find what one process finds, and every table tells the same story."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2 import params
from gpt2.data import sample_windows
from gpt2.files import UserError, read_json
from gpt2.model import GPT, GPTConfig
from gpt2.norm_study import (
    CURVE_COLUMNS,
    RUN_COLUMNS,
    NormStudyConfig,
    RunResult,
    Setting,
    StudyData,
    curve_rows,
    load_study_data,
    run_rows,
    study_figures,
    train_run,
    wide_rows,
)
from gpt2.shards import TokenSet
from stages import norm_study
from tests.training_run import SECTIONS, SHAPE, prepare_folder

NORMS = ("preln", "postln", "deepnorm")
CPU = torch.device("cpu")
KEYS = ("val_loss", "loss_spikes", "diverged", "diverged_at_step", "stalled", "max_grad_norm")


def make_config(**changed) -> NormStudyConfig:
    return params.build(NormStudyConfig, {**SECTIONS["norm_study"], **changed}, "tiny.norm_study")


def load_data(folder: Path, config: NormStudyConfig) -> StudyData:
    return load_study_data(config, *(TokenSet(folder / "data" / "tokens", split) for split in ("train", "val")))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder in which the stage has run, with two workers."""
    folder = prepare_folder(tmp_path_factory.mktemp("study"), hardware={"threads": 2})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        norm_study.main()
    return folder


@pytest.fixture(scope="module")
def results(study) -> list[RunResult]:
    """The same runs, one after another in this process."""
    config = make_config()
    data = load_data(study, config)
    settings = [
        Setting(norm, max_lr, warmup_steps, seed)
        for norm in config.norms
        for max_lr in config.max_lrs
        for warmup_steps in config.warmup_steps
        for seed in config.seeds
    ]
    return [train_run(setting, config, data, CPU) for setting in settings]


def read_rows(study: Path, name: str) -> list[list[str]]:
    with open(study / "plots" / "norm_study" / f"{name}.csv", newline="") as table:
        return list(csv.reader(table))


def written(columns: tuple, rows: list) -> list[list[str]]:
    """Rows as their text in a file, where floats are exact."""
    return [list(columns), *([str(value) for value in row] for row in rows)]


def test_two_workers_find_exactly_what_one_process_finds(study, results):
    config = make_config()
    data = load_data(study, config)
    assert read_rows(study, "runs") == written(RUN_COLUMNS, run_rows(results, data.unigram_entropy))
    assert read_rows(study, "curves") == written(CURVE_COLUMNS, curve_rows(results))
    assert read_json(study / "metrics" / "norm_study.json") == study_figures(results, config, data)


def test_runs_stand_in_the_order_of_their_settings(study):
    settings = [row[:4] for row in read_rows(study, "runs")[1:]]
    assert settings == [[n, lr, "5", seed] for n in NORMS for lr in ("0.005", "100000.0") for seed in ("1", "2")]


def test_wide_tables_hold_the_reference_runs_of_the_curves(study):
    config = make_config()
    curves = [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in read_rows(study, "curves")[1:]]
    for name, column in (("loss", "loss"), ("grad_norm", "grad_norm")):
        header, *rows = read_rows(study, name)
        assert header == ["step", *NORMS]
        assert [row[0] for row in rows] == [str(step) for step in range(1, config.max_steps + 1)]
        for i, norm in enumerate(NORMS, start=1):
            reference = [c[column] for c in curves if (c["norm"], c["max_lr"], c["seed"]) == (norm, "0.005", "1")]
            assert [row[i] for row in rows] == reference


def test_a_run_that_diverges_is_recorded_with_the_steps_it_had(study, results):
    runs = [dict(zip(RUN_COLUMNS, row, strict=True)) for row in read_rows(study, "runs")[1:]]
    curves = read_rows(study, "curves")[1:]
    for run, result in zip(runs, results, strict=True):
        steps = [row for row in curves if row[:4] == [run[key] for key in CURVE_COLUMNS[:4]]]
        diverged = run["max_lr"] == "100000.0"
        assert (run["diverged"], run["diverged_at_step"]) == (("1", str(len(steps))) if diverged else ("0", "-1"))
        assert len(steps) == len(result.losses) < 40 if diverged else len(steps) == 40
        assert math.isfinite(float(run["val_loss"])) and all(math.isfinite(float(row[5])) for row in steps)


def test_the_other_runs_learn_and_seeds_differ(results):
    calm = [result for result in results if result.setting.max_lr < 1]
    assert all(result.val_loss < result.losses[0] - 0.3 for result in calm)
    assert len({result.losses[0] for result in calm}) == len(calm) == 6


def test_figures_carry_the_contract_for_every_norm(study):
    figures = read_json(study / "metrics" / "norm_study.json")
    assert figures.keys() >= {f"{norm}_{key}" for norm in NORMS for key in KEYS}
    assert figures["runs"] == 12
    runs = [dict(zip(RUN_COLUMNS, row, strict=True)) for row in read_rows(study, "runs")[1:]]
    for norm in NORMS:
        ours = [run for run in runs if run["norm"] == norm]
        reference = [run for run in ours if run["max_lr"] == "0.005"]
        mean = sum(float(run["val_loss"]) for run in reference) / 2
        assert figures[f"{norm}_val_loss"] == pytest.approx(mean) == figures[f"{norm}_best_val_loss"]
        assert figures[f"{norm}_max_grad_norm"] == max(float(run["max_grad_norm"]) for run in reference)
        assert (figures[f"{norm}_diverged"], figures[f"{norm}_stalled"]) == (1, 1)
        earliest = min(int(run["diverged_at_step"]) for run in ours if run["diverged"] == "1")
        assert figures[f"{norm}_diverged_at_step"] == earliest


# Tables and figures from results by hand.


def make_result(norm: str, max_lr: float, seed: int, losses: list[float], val_loss: float, diverged_at_step: int = -1):
    grad_norms = [10 * loss for loss in losses]
    return RunResult(Setting(norm, max_lr, 5, seed), losses, grad_norms, val_loss, diverged_at_step)


NO_DATA = StudyData(torch.empty(0), torch.empty(0), vocab_size=200, unigram_entropy=3.0)


def test_cells_after_divergence_are_empty():
    config = make_config(max_lrs=[0.1], seeds=[1])
    results = [
        make_result("preln", 0.1, 1, [5.0, 4.0, 3.0], 3.0),
        make_result("postln", 0.1, 1, [5.5], 9.0, diverged_at_step=1),
        make_result("deepnorm", 0.1, 1, [], 9.0, diverged_at_step=0),
    ]
    assert wide_rows(results, config, "losses") == [[1, 5.0, 5.5, ""], [2, 4.0, "", ""], [3, 3.0, "", ""]]
    assert wide_rows(results, config, "grad_norms")[0] == [1, 50.0, 55.0, ""]
    figures = study_figures(results, config, NO_DATA)
    assert [figures[f"{norm}_diverged_at_step"] for norm in NORMS] == [-1, 1, 0]
    assert [figures[f"{norm}_diverged"] for norm in NORMS] == [0, 1, 1]
    assert [figures[f"{norm}_max_grad_norm"] for norm in NORMS] == [50.0, 55.0, 0.0]
    assert [figures[f"{norm}_stalled"] for norm in NORMS] == [1, 1, 1]


def test_the_best_setting_is_the_lowest_mean_over_seeds_and_the_headline_the_first_setting():
    config = make_config(norms=["postln"], max_lrs=[0.1, 0.2], seeds=[1, 2])
    spiking = [3.0] * 32 + [9.0, 3.0]
    results = [
        make_result("postln", 0.1, 1, [5.0, 4.0], 2.8),
        make_result("postln", 0.1, 2, [6.0, 4.0], 2.6),
        # The best single run, and the worse mean.
        make_result("postln", 0.2, 1, spiking, 2.0),
        make_result("postln", 0.2, 2, spiking[:-1], 3.6, diverged_at_step=33),
    ]
    figures = study_figures(results, config, NO_DATA)
    assert figures["postln_val_loss"] == figures["postln_best_val_loss"] == pytest.approx(2.7)
    assert figures["postln_best_max_lr"] == 0.1
    assert figures["postln_max_grad_norm"] == 60.0
    assert (figures["postln_loss_spikes"], figures["postln_diverged"], figures["postln_stalled"]) == (2, 1, 1)
    better = [make_result("postln", 0.2, 2, [5.0], 2.2) if result is results[3] else result for result in results]
    figures = study_figures(better, config, NO_DATA)
    assert (figures["postln_best_max_lr"], figures["postln_best_val_loss"]) == (0.2, pytest.approx(2.1))
    assert (figures["postln_val_loss"], figures["postln_stalled"]) == (pytest.approx(2.7), 0)


# Data and single runs.


def test_slices_are_renumbered_without_loss(study):
    config = make_config()
    data = load_data(study, config)
    train, val = (TokenSet(study / "data" / "tokens", split) for split in ("train", "val"))
    count = 1000 // 16 * 16 + 1
    start = train.n_tokens - 1001
    streams = [(data.train, train.read(start, count)), (data.val, val.read(0, 200 // 16 * 16 + 1))]
    pairs = set()
    for windows, stream in streams:
        assert windows.shape == (len(stream) // 16, 17)
        # The last token of a window is the first of the next.
        assert torch.equal(windows[:-1, -1], windows[1:, 0])
        dense = [*windows[:, :-1].flatten().tolist(), int(windows[-1, -1])]
        pairs |= set(zip(dense, stream.tolist(), strict=True))
    assert sorted(dense for dense, _ in pairs) == list(range(data.vocab_size))
    assert len({token for _, token in pairs}) == len(pairs)
    assert data.unigram_entropy == train.unigram_entropy


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_has_the_weights_and_the_data_order_of_its_seed(study, seed):
    config = make_config()
    data = load_data(study, config)
    result = train_run(Setting("deepnorm", 1e-3, 5, seed), config, data, CPU)
    model = GPT(GPTConfig(**SHAPE, vocab_size=data.vocab_size, norm="deepnorm"), seed)
    batch = data.train[sample_windows(np.arange(4), len(data.train), seed)]
    assert result.losses[0] == model(batch[:, :-1], batch[:, 1:]).item()
    assert result == train_run(Setting("deepnorm", 1e-3, 5, seed), config, data, CPU)


def test_micro_batches_that_do_not_divide_the_batch_change_rounding_alone(study):
    whole, parts = make_config(), make_config(micro_batch=3)
    data = load_data(study, whole)
    first, second = (train_run(Setting("preln", 1e-3, 5, 1), config, data, CPU) for config in (whole, parts))
    # The parts of three and one are summed in another order.
    np.testing.assert_allclose(second.losses[:2], first.losses[:2], rtol=1e-6)
    np.testing.assert_allclose(second.grad_norms[:2], first.grad_norms[:2], rtol=1e-5)
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warmup_steps": [5, 40]}, r"tiny\.norm_study: warmup_steps=\[5, 40\] must be less than max_steps=40"),
        ({"train_tokens": 63}, r"train_tokens=63 must fill one batch of batch_windows × block_size = 64; raise it"),
        ({"norms": ["preln", "sandwich"]}, r"tiny\.norm_study\.norms\.1 = 'sandwich'"),
        ({"norms": []}, r"tiny\.norm_study\.norms = \[\]"),
        ({"seeds": []}, r"tiny\.norm_study\.seeds = \[\]"),
        ({"max_lrs": [1e-3, -1e-3]}, r"tiny\.norm_study\.max_lrs\.1 = -0\.001"),
        ({"min_lr_fraction": 1.5}, r"tiny\.norm_study\.min_lr_fraction = 1\.5"),
        ({"n_embd": 15}, r"n_embd=15 must be a multiple of n_head=2; nearest: 1[46]"),
    ],
)
def test_parameters_are_refused_by_name(changed, message):
    with pytest.raises(UserError, match=message):
        make_config(**changed)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("eval_tokens", r"data/tokens/val has 4004 tokens; \d+ are needed"),
        ("train_tokens", r"data/tokens/train has 8008"),
    ],
)
def test_the_stage_refuses_too_few_tokens(tmp_path, monkeypatch, key, message):
    prepare_folder(tmp_path, norm_study={key: 20_000})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^norm-study: {message}"):
        norm_study.main()
    assert not (tmp_path / "plots").exists()
