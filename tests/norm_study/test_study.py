"""The norm study: several workers find what one process finds, and every table tells the same story."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.data.order import sample_windows
from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.norm_study.study import (
    CURVE_COLUMNS,
    GRAD_NORM_CAP,
    LOSS_CAP,
    NORM_RUN_COLUMNS,
    NORM_TABLE_COLUMNS,
    NormSetting,
    NormStudyConfig,
    RunResult,
    StudyData,
    curve_rows,
    load_study_data,
    norm_table_rows,
    run_rows,
    study_figures,
    train_norm_run,
    unigram_losses,
    wide_rows,
)
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
from stages import norm_study
from tests.training_run import SECTIONS, SHAPE, prepare_folder

NORMS = ("preln", "postln", "deepnorm")
CPU = torch.device("cpu")
# A vocabulary that does not hold all bytes of the text.
SECTION = {**SECTIONS["norm_study"], "vocab_size": 40}
KEYS = ("val_loss", "loss_spikes", "diverged", "diverged_at_step", "stalled", "max_grad_norm")


def make_config(**changed) -> NormStudyConfig:
    return params.build(NormStudyConfig, {**SECTION, **changed}, "tiny.norm_study")


def load_data(folder: Path, config: NormStudyConfig) -> StudyData:
    return load_study_data(config, *(TokenSet(folder / "data" / "tokens", split) for split in ("train", "val")))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder in which the stage has run, with two workers."""
    folder = prepare_folder(tmp_path_factory.mktemp("study"), hardware={"threads": 2}, norm_study=SECTION)
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
        NormSetting(norm, max_lr, warmup_steps, seed)
        for norm in config.norms
        for max_lr in config.max_lrs
        for warmup_steps in config.warmup_steps
        for seed in config.seeds
    ]
    return [train_norm_run(setting, config, data, CPU) for setting in settings]


def read_rows(study: Path, name: str) -> list[list[str]]:
    with open(study / "plots" / "norm_study" / f"{name}.csv", newline="") as table:
        return list(csv.reader(table))


def read_dicts(study: Path, name: str) -> list[dict[str, str]]:
    header, *rows = read_rows(study, name)
    return [dict(zip(header, row, strict=True)) for row in rows]


def written(columns: tuple, rows: list) -> list[list[str]]:
    """Rows as their text in a file, where floats are exact."""
    return [list(columns), *([str(value) for value in row] for row in rows)]


def test_two_workers_find_exactly_what_one_process_finds(study, results):
    config = make_config()
    data = load_data(study, config)
    assert read_rows(study, "runs") == written(NORM_RUN_COLUMNS, run_rows(results, data))
    assert read_rows(study, "table") == written(NORM_TABLE_COLUMNS, norm_table_rows(results, data))
    assert read_rows(study, "curves") == written(CURVE_COLUMNS, curve_rows(results))
    assert read_json(study / "metrics" / "norm_study.json") == study_figures(results, config, data)


def test_runs_stand_in_the_order_of_their_settings(study):
    settings = [row[:4] for row in read_rows(study, "runs")[1:]]
    assert settings == [[n, lr, "5", seed] for n in NORMS for lr in ("0.005", "100000.0") for seed in ("1", "2")]


def test_wide_tables_hold_the_reference_runs_of_the_curves(study):
    config = make_config()
    curves = read_dicts(study, "curves")
    for name, column in (("loss", "loss"), ("grad_norm", "grad_norm")):
        header, *rows = read_rows(study, name)
        assert header == ["step", *NORMS]
        assert [row[0] for row in rows] == [str(step) for step in range(1, config.max_steps + 1)]
        for i, norm in enumerate(NORMS, start=1):
            reference = [c[column] for c in curves if (c["norm"], c["max_lr"], c["seed"]) == (norm, "0.005", "1")]
            assert [row[i] for row in rows] == reference


def test_a_run_that_diverges_is_recorded_with_the_steps_it_had(study, results):
    curves = read_rows(study, "curves")[1:]
    for run, result in zip(read_dicts(study, "runs"), results, strict=True):
        steps = [row for row in curves if row[:4] == [run[key] for key in CURVE_COLUMNS[:4]]]
        diverged = run["max_lr"] == "100000.0"
        assert (run["diverged"], run["diverged_at_step"]) == (("1", str(len(steps))) if diverged else ("0", "-1"))
        assert len(steps) == len(result.losses) < 40 if diverged else len(steps) == 40
        assert math.isfinite(float(run["val_loss"])) and all(math.isfinite(float(row[5])) for row in steps)
        # It broke off: whether it would have learned is not known.
        assert not (diverged and int(run["stalled"]))


def test_the_other_runs_learn_and_seeds_differ(results):
    calm = [result for result in results if result.setting.max_lr < 1]
    assert all(result.val_loss < result.losses[0] - 0.3 for result in calm)
    assert len({result.losses[0] for result in calm}) == len(calm) == 6


def test_figures_carry_the_contract_for_every_norm(study):
    figures = read_json(study / "metrics" / "norm_study.json")
    assert figures.keys() >= {f"{norm}_{key}" for norm in NORMS for key in KEYS}
    assert (figures["runs"], figures["seeds"], figures["settings"]) == (12, 2, 2)
    runs = read_dicts(study, "runs")
    for norm in NORMS:
        ours = [run for run in runs if run["norm"] == norm]
        reference = [run for run in ours if run["max_lr"] == "0.005"]
        mean = sum(float(run["val_loss"]) for run in reference) / 2
        assert figures[f"{norm}_val_loss"] == pytest.approx(mean) == figures[f"{norm}_best_val_loss"]
        assert figures[f"{norm}_max_grad_norm"] == max(float(run["max_grad_norm"]) for run in reference)
        assert figures[f"{norm}_diverged"] == figures[f"{norm}_settings_diverged"] == 1
        assert figures[f"{norm}_stalled"] == max(int(run["stalled"]) for run in ours)
        earliest = min(int(run["diverged_at_step"]) for run in ours if run["diverged"] == "1")
        assert figures[f"{norm}_diverged_at_step"] == earliest


# Tables and figures from results by hand.

NO_DATA = StudyData(torch.empty(0), torch.empty(0), vocab_size=200, unigram_entropy=3.1, unigram_val_loss=3.0)


def make_result(
    setting: tuple, losses: list[float], val_loss: float, diverged_at_step: int = -1, max_grad_norm: float = 0.0
) -> RunResult:
    """The run of (norm, learning rate, seed); its largest gradient norm is at least ten times its largest loss."""
    norm, max_lr, seed = setting
    grad_norms = [10 * loss for loss in losses]
    largest = float(np.max([*grad_norms, max_grad_norm]))
    return RunResult(NormSetting(norm, max_lr, 5, seed), losses, grad_norms, largest, val_loss, diverged_at_step)


def test_cells_after_divergence_are_empty():
    config = make_config(max_lrs=[0.1], seeds=[1])
    results = [
        make_result(("preln", 0.1, 1), [5.0, 4.0, 3.0], 3.0),
        make_result(("postln", 0.1, 1), [5.5], 9.0, diverged_at_step=1),
        make_result(("deepnorm", 0.1, 1), [], 9.0, diverged_at_step=0),
    ]
    assert wide_rows(results, config, "losses") == [[1, 5.0, 5.5, ""], [2, 4.0, "", ""], [3, 3.0, "", ""]]
    assert wide_rows(results, config, "grad_norms")[0] == [1, 50.0, 55.0, ""]
    figures = study_figures(results, config, NO_DATA)
    assert [figures[f"{norm}_diverged_at_step"] for norm in NORMS] == [-1, 1, 0]
    assert [figures[f"{norm}_diverged"] for norm in NORMS] == [0, 1, 1]
    assert [figures[f"{norm}_max_grad_norm"] for norm in NORMS] == [50.0, 55.0, 0.0]
    assert [figures[f"{norm}_stalled"] for norm in NORMS] == [1, 0, 0]


SPIKING = [3.0] * 32 + [9.0, 3.0]


def make_seeds() -> list[RunResult]:
    return [
        make_result(("postln", 0.1, 1), [5.0, 4.0], 2.8),
        make_result(("postln", 0.1, 2), [6.0, 4.0], 2.6),
        # The best single run, and the worse mean.
        make_result(("postln", 0.2, 1), SPIKING, 2.0),
        make_result(("postln", 0.2, 2), SPIKING[:-1], 3.6, diverged_at_step=33, max_grad_norm=1e3),
    ]


def test_the_table_has_mean_and_range_over_seeds_sums_of_faults_and_the_worst_gradient():
    first, second = norm_table_rows(make_seeds(), NO_DATA)
    assert first == ("postln", 0.1, 5, 2, pytest.approx(2.7), 2.6, 2.8, 0, 0, -1, 0, 60.0)
    assert second == ("postln", 0.2, 5, 2, pytest.approx(2.8), 2.0, 3.6, 2, 1, 33, 0, 1e3)
    stalled = [make_result(("preln", 0.1, seed), [5.0], 2.95) for seed in (1, 2, 3)]
    assert norm_table_rows(stalled, NO_DATA)[0][-2] == 3


def test_the_best_setting_is_the_lowest_mean_over_seeds_and_the_headline_the_first_setting():
    config = make_config(norms=["postln"], max_lrs=[0.1, 0.2], seeds=[1, 2])
    results = make_seeds()
    figures = study_figures(results, config, NO_DATA)
    assert figures["postln_val_loss"] == figures["postln_best_val_loss"] == pytest.approx(2.7)
    assert (figures["postln_best_max_lr"], figures["postln_best_warmup_steps"]) == (0.1, 5)
    assert figures["postln_max_grad_norm"] == 60.0
    assert (figures["postln_loss_spikes"], figures["postln_diverged"], figures["postln_stalled"]) == (2, 1, 0)
    counts = [figures[f"postln_settings_{fault}"] for fault in ("spiked", "diverged", "stalled")]
    assert counts == [1, 1, 0]
    better = [*results[:3], make_result(("postln", 0.2, 2), [5.0], 2.2)]
    figures = study_figures(better, config, NO_DATA)
    assert (figures["postln_best_max_lr"], figures["postln_best_val_loss"]) == (0.2, pytest.approx(2.1))
    assert (figures["postln_val_loss"], figures["postln_diverged"]) == (pytest.approx(2.7), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinite_in_the_table_and_capped_in_the_figures(value):
    config = make_config(norms=["preln"], max_lrs=[0.1, 0.2], seeds=[1, 2])
    results = [
        make_result(("preln", 0.1, 1), [4.0], value, diverged_at_step=1, max_grad_norm=value),
        make_result(("preln", 0.1, 2), [4.0], 2.5),
        make_result(("preln", 0.2, 1), [4.0], 2.7),
        make_result(("preln", 0.2, 2), [4.0], 2.7),
    ]
    assert run_rows(results, NO_DATA)[0][4:] == (
        pytest.approx(value, nan_ok=True),
        0,
        1,
        1,
        0,
        pytest.approx(value, nan_ok=True),
    )
    row = dict(zip(NORM_TABLE_COLUMNS, norm_table_rows(results, NO_DATA)[0], strict=True))
    assert (row["val_loss"], row["val_loss_low"], row["val_loss_high"]) == (math.inf, 2.5, math.inf)
    assert (row["diverged"], row["stalled"], row["max_grad_norm"]) == (1, 0, math.inf)
    figures = study_figures(results, config, NO_DATA)
    assert (figures["preln_val_loss"], figures["preln_max_grad_norm"]) == (LOSS_CAP, GRAD_NORM_CAP)
    assert figures["preln_best_val_loss"] == pytest.approx(2.7)


# Data and single runs.


def test_learning_rates_beyond_all_bounds_are_recorded_results(tmp_path, monkeypatch):
    section = {**SECTION, "max_lrs": [1e10, 1e30], "seeds": [1]}
    monkeypatch.chdir(prepare_folder(tmp_path, norm_study=section))
    norm_study.main()
    figures = read_json(tmp_path / "metrics" / "norm_study.json")
    assert all(math.isfinite(value) for value in figures.values())
    runs = read_dicts(tmp_path, "runs")
    assert len(runs) == 6 and {(run["diverged"], run["stalled"]) for run in runs} == {("1", "0")}
    assert all(0 < int(run["diverged_at_step"]) < 40 for run in runs)
    for norm in NORMS:
        loss = float(next(run["val_loss"] for run in runs if run["norm"] == norm))
        assert figures[f"{norm}_val_loss"] == (loss if loss < LOSS_CAP else LOSS_CAP)
        assert (figures[f"{norm}_diverged"], figures[f"{norm}_settings_diverged"]) == (1, 2)
    assert not all(math.isfinite(float(run["val_loss"])) for run in runs)


def test_weights_that_only_the_validation_finds_broken_are_a_divergence_after_the_last_step(study):
    config = make_config(max_steps=1, warmup_steps=[0])
    result = train_norm_run(NormSetting("preln", 1e30, 0, 1), config, load_data(study, config), CPU)
    assert (len(result.losses), result.diverged_at_step) == (1, 1)
    assert not math.isfinite(result.val_loss) and math.isfinite(result.max_grad_norm)


def test_tokens_are_numbered_by_frequency_and_the_rare_ones_alike(study):
    config = make_config()
    data = load_data(study, config)
    train, val = (TokenSet(study / "data" / "tokens", split) for split in ("train", "val"))
    windows, others = spread_windows(train, 16, 1000), spread_windows(val, 16, 200)
    numbers = dict(zip(windows.flatten().tolist(), data.train.flatten().tolist(), strict=True))
    counts = torch.bincount(windows[:, 1:].flatten(), minlength=257)
    frequent = sorted(numbers, key=lambda token: (-counts[token], token))
    # The text has more than 40 kinds of bytes: the last number stands for many.
    assert [numbers[token] for token in frequent] == [min(rank, 39) for rank in range(len(frequent))]
    assert len(frequent) > 40
    for before, after in ((windows, data.train), (others, data.val)):
        assert after.tolist() == [[numbers.get(token, 39) for token in row] for row in before.tolist()]


def test_a_large_vocabulary_keeps_every_token_apart(study):
    data = load_data(study, make_config(vocab_size=300))
    windows = spread_windows(TokenSet(study / "data" / "tokens", "train"), 16, 1000)
    pairs = set(zip(windows.flatten().tolist(), data.train.flatten().tolist(), strict=True))
    assert len(pairs) == len({token for token, _ in pairs}) == len({number for _, number in pairs})


@pytest.mark.parametrize(("n_tokens", "windows"), [(8000, 500), (16, 1), (159, 9)])
def test_windows_are_spread_over_the_whole_split(study, n_tokens, windows):
    train = TokenSet(study / "data" / "tokens", "train")
    available = (train.n_tokens - 1) // 16
    found = spread_windows(train, 16, n_tokens)
    assert found.shape == (windows, 17) and available == 500
    starts = [i * available // windows * 16 for i in range(windows)]
    assert found.tolist() == [train.read(start, 17).tolist() for start in starts]


def test_the_unigram_losses_are_those_of_guessing_by_the_frequencies_of_training():
    # Targets 1, 1, 2, 1 in training; 1, 2 and the unknown 3 in validation.
    train, val = torch.tensor([[0, 1, 1], [3, 2, 1]]), torch.tensor([[0, 1], [0, 2], [0, 3]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    on_val = -(math.log(0.75) + math.log(0.25) + math.log(0.25)) / 3
    assert unigram_losses(train, val) == (pytest.approx(entropy), pytest.approx(on_val))


def test_a_run_that_learned_frequencies_alone_ends_at_the_unigram_loss_and_is_stalled(study):
    config = make_config()
    data = load_data(study, config)
    result = train_norm_run(NormSetting("preln", 5e-3, 5, 1), config, data, CPU)
    guessing = replace(result, val_loss=data.unigram_val_loss)
    learned = replace(result, val_loss=data.unigram_val_loss - 0.11)
    broken = replace(guessing, diverged_at_step=3)
    assert [row[-2] for row in run_rows([guessing, learned, broken], data)] == [1, 0, 0]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_has_the_weights_and_the_data_order_of_its_seed(study, seed):
    config = make_config()
    data = load_data(study, config)
    result = train_norm_run(NormSetting("deepnorm", 1e-3, 5, seed), config, data, CPU)
    model = GPT(GPTConfig(**SHAPE, vocab_size=data.vocab_size, norm="deepnorm"), seed)
    batch = data.train[sample_windows(np.arange(4), len(data.train), seed)]
    assert result.losses[0] == model(batch[:, :-1], batch[:, 1:]).item()
    assert result == train_norm_run(NormSetting("deepnorm", 1e-3, 5, seed), config, data, CPU)


def test_micro_batches_that_do_not_divide_the_batch_change_rounding_alone(study):
    whole, parts = make_config(), make_config(micro_batch=3)
    data = load_data(study, whole)
    first, second = (train_norm_run(NormSetting("preln", 1e-3, 5, 1), config, data, CPU) for config in (whole, parts))
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
        ({"vocab_size": 1}, r"tiny\.norm_study\.vocab_size = 1"),
        ({"seeds": [1, 2, 1]}, r"tiny\.norm_study: seeds=\[1, 2, 1\] must not name a value twice; remove one"),
        ({"n_embd": 15}, r"n_embd=15 must be a multiple of n_head=2; nearest: 1[46]"),
    ],
)
def test_parameters_are_refused_by_name(changed, message):
    with pytest.raises(UserError, match=message):
        make_config(**changed)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("eval_tokens", r"data/tokens/val has 4004 tokens, 250 windows of 16; 20000 tokens, 1250 windows"),
        ("train_tokens", r"data/tokens/train has 8008 tokens, 500 windows of 16; .*; ask for 1 to 500"),
    ],
)
def test_the_stage_refuses_too_few_tokens(tmp_path, monkeypatch, key, message):
    prepare_folder(tmp_path, norm_study={**SECTION, key: 20_000})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^norm-study: {message}"):
        norm_study.main()
    assert not (tmp_path / "plots").exists()
