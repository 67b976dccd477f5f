"""The norm study: several workers find what one process finds, and its runs and diagnosis are as specified."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gpt2.data.order import sample_windows
from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.norm_study import study as module
from gpt2.norm_study.study import (
    NormSetting,
    NormStudyConfig,
    StudyData,
    grad_ratio,
    load_study_data,
    run_study,
    token_cosine,
    train_norm_run,
    unigram_losses,
)
from gpt2.norm_study.tables import LOSS_CAP, average_curves, study_figures, tabulate_settings
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
from gpt2.pipeline.hardware import HardwareConfig
from stages import norm_study
from tests.training_run import ADAM, SECTIONS, SHAPE, prepare_folder

NORMS = ("preln", "postln", "deepnorm")
CPU = torch.device("cpu")
MAIN = {"optimizer": "adamw", "tied": True, "max_lrs": [5e-3, 1e5], "warmup_steps": [5], "seeds": [1, 2]}
ONE = {"max_lrs": [5e-3], "seeds": [1]}
# A vocabulary that does not hold all bytes of the text.
SECTION = {
    **SHAPE,
    **ADAM,
    "norms": list(NORMS),
    "arms": {"main": MAIN, "own_output": {**MAIN, **ONE, "tied": False}, "muon": {**MAIN, **ONE, "optimizer": "muon"}},
    **{"max_steps": 40, "min_lr_fraction": 0.1, "batch_windows": 4, "micro_batch": 4, "precision": "float32"},
    **{"train_tokens": 1000, "eval_tokens": 200, "vocab_size": 40},
}
SETTING = NormSetting("main", "preln", 1e-3, 5, 1)
Frames = tuple[pd.DataFrame, pd.DataFrame]


def make_config(**changed) -> NormStudyConfig:
    return params.build(NormStudyConfig, {**SECTION, **changed}, "tiny.norm_study")


CONFIG = make_config()


def prepare_study(folder: Path, threads: int = 1, **changed) -> Path:
    """A folder in which the stage can run."""
    prepare_folder(folder)
    sections = {"hardware": {**SECTIONS["hardware"], "threads": threads}, "norm_study": {**SECTION, **changed}}
    (folder / "params.yaml").write_text(json.dumps({"norm": "preln", "scale": "tiny", "tiny": sections}))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder in which the stage has run, with two workers."""
    folder = prepare_study(tmp_path_factory.mktemp("study"), threads=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        norm_study.main()
    return folder


@pytest.fixture(scope="module")
def splits(study) -> tuple[TokenSet, TokenSet]:
    """Training and validation split."""
    return TokenSet(study / "data" / "tokens", "train"), TokenSet(study / "data" / "tokens", "val")


@pytest.fixture(scope="module")
def data(splits) -> StudyData:
    return load_study_data(CONFIG, *splits)


@pytest.fixture(scope="module")
def alone(data) -> Frames:
    """The same runs and their curves, one after another in this process."""
    return run_study(CONFIG, data, params.build(HardwareConfig, SECTIONS["hardware"], "hardware"))


def read_rows(study: Path, name: str) -> list[list[str]]:
    with open(study / "plots" / "norm_study" / f"{name}.csv", newline="") as table:
        return list(csv.reader(table))


def test_two_workers_find_exactly_what_one_process_finds(study, alone, data):
    runs, curves = alone
    tables = {"runs": runs, "table": tabulate_settings(runs), "curves": curves}
    tables |= {name: average_curves(curves, CONFIG, name) for name in ("loss", "grad_norm")}
    for name, table in tables.items():
        # Rows as their text in a file, where floats are exact.
        rows = [[str(value) for value in row] for row in table.itertuples(index=False)]
        assert read_rows(study, name) == [[*table.columns], *rows], name
    assert read_json(study / "metrics" / "norm_study.json") == study_figures(runs, CONFIG, data)


def test_runs_are_in_the_order_of_their_settings(alone):
    settings = alone[0].iloc[:, :5].itertuples(index=False, name=None)
    main = [("main", norm, lr, 5, seed) for norm in NORMS for lr in (5e-3, 1e5) for seed in (1, 2)]
    assert [*settings] == [*main, *((arm, norm, 5e-3, 5, 1) for arm in ("own_output", "muon") for norm in NORMS)]


def test_a_diverged_run_has_the_steps_before_its_divergence(alone):
    runs, curves = alone
    keys = [*runs.columns[:5]]
    lengths = curves.groupby(keys, sort=False).size()
    assert curves["step"].tolist() == [step for length in lengths for step in range(1, length + 1)]
    assert np.isfinite(curves[["loss", "grad_norm"]]).all(axis=None) and np.isfinite(runs["val_loss"]).all()
    for run, length in zip(runs.itertuples(), lengths, strict=True):
        diverged = run.max_lr == 1e5
        assert (run.diverged, run.diverged_at_step) == ((1, length) if diverged else (0, -1))
        assert length < 40 if diverged else length == 40
        # It broke off: whether it would have learned is not known.
        assert not (diverged and run.stalled)


def test_runs_learn_and_an_arm_changes_its_output_matrix_or_its_optimizer_alone(alone):
    runs, curves = alone
    losses = curves[curves["max_lr"] < 1].pivot(index="step", columns=["arm", "norm", "seed"], values="loss")
    final = runs[runs["max_lr"] < 1].set_index(["arm", "norm", "seed"])["val_loss"]
    assert (final < losses.loc[1] - 0.3).all()
    assert losses.loc[1, "main"].nunique() == 6
    for norm in NORMS:
        main, own, muon = (losses[arm, norm, 1] for arm in ("main", "own_output", "muon"))
        assert main[1] == muon[1] != own[1] and (main[2:] != muon[2:]).all()


def test_learning_rates_beyond_all_bounds_are_recorded_results(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare_study(tmp_path, arms={"main": {**MAIN, "max_lrs": [1e10, 1e30], "seeds": [1]}}))
    norm_study.main()
    figures = read_json(tmp_path / "metrics" / "norm_study.json")
    assert all(math.isfinite(value) for value in figures.values())
    runs = pd.read_csv(tmp_path / "plots" / "norm_study" / "runs.csv")
    assert len(runs) == 6 and (runs["diverged"] == 1).all() and (runs["stalled"] == 0).all()
    assert runs["diverged_at_step"].between(1, 39).all() and not np.isfinite(runs["val_loss"]).all()
    for norm in NORMS:
        losses = runs["val_loss"][(runs["norm"] == norm) & np.isfinite(runs["val_loss"])]
        assert figures[f"{norm}_val_loss"] == pytest.approx(min(losses.mean() if len(losses) else math.inf, LOSS_CAP))
        assert (figures[f"{norm}_diverged"], figures[f"{norm}_lost_runs"]) == (2, 2)


# Single runs.


def test_weights_that_only_the_validation_finds_broken_are_a_divergence_after_the_last_step(data):
    config = make_config(max_steps=1, arms={"main": {**MAIN, "warmup_steps": [0]}})
    run, curve = train_norm_run(NormSetting("main", "preln", 1e30, 0, 1), config, data, CPU)
    assert (len(curve), run["diverged"], run["diverged_at_step"]) == (1, 1, 1)
    assert not math.isfinite(run["val_loss"]) and math.isfinite(run["max_grad_norm"])


def test_a_run_that_diverges_in_its_first_step_has_an_empty_curve(data, monkeypatch):
    monkeypatch.setattr(NormStudyConfig, "init_std", 1e30)
    run, curve = train_norm_run(SETTING, CONFIG, data, CPU)
    assert (len(curve), run["diverged_at_step"]) == (0, 0)
    assert average_curves(curve, CONFIG, "loss").empty


@pytest.mark.parametrize(("below", "max_lr", "stalled"), [(0.0, 1e-3, 1), (0.11, 1e-3, 0), (0.0, 1e5, 0)])
def test_a_run_that_ends_at_the_unigram_loss_is_stalled_unless_it_diverged(data, monkeypatch, below, max_lr, stalled):
    monkeypatch.setattr(module, "mean_loss", lambda *_: data.unigram_val_loss - below)
    run, _ = train_norm_run(NormSetting("main", "preln", max_lr, 5, 1), CONFIG, data, CPU)
    assert (run["stalled"], run["diverged"]) == (stalled, int(max_lr > 1))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_has_the_weights_and_the_data_order_of_its_seed(data, seed):
    setting = NormSetting("main", "deepnorm", 1e-3, 5, seed)
    run, curve = train_norm_run(setting, CONFIG, data, CPU)
    model = GPT(GPTConfig(**SHAPE, vocab_size=40, norm="deepnorm"), seed, init_std=CONFIG.init_std)
    batch = data.train[sample_windows(np.arange(4), len(data.train), seed)]
    assert curve["loss"][0] == model(batch[:, :-1], batch[:, 1:]).item()
    again, same_curve = train_norm_run(setting, CONFIG, data, CPU)
    assert run == again and curve.equals(same_curve)


def test_micro_batches_that_do_not_divide_the_batch_change_rounding_alone(data):
    first, second = (train_norm_run(SETTING, make_config(micro_batch=n), data, CPU)[1] for n in (4, 3))
    # The parts of three and one are summed in another order.
    np.testing.assert_allclose(second["loss"][:2], first["loss"][:2], rtol=1e-6)
    np.testing.assert_allclose(second["grad_norm"][:2], first["grad_norm"][:2], rtol=1e-5)
    np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-3)


# Diagnosis.


def make_model(norm: str, **changed) -> GPT:
    return GPT(GPTConfig(**SHAPE, vocab_size=50, norm=norm), 1, **changed)


WINDOWS = torch.randint(50, (6, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS)
def test_token_cosine_is_one_for_equal_embeddings_and_small_for_random_ones(norm):
    model = make_model(norm, init_std=0.1)
    hidden = model.hidden(WINDOWS[:, :-1]).detach()
    pairs = [torch.cosine_similarity(h[i], h[j], dim=0).item() for h in hidden for i in range(16) for j in range(i)]
    assert token_cosine(model, WINDOWS) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert np.mean(pairs) < 0.1
    with torch.no_grad():
        model.wte.weight[:] = model.wte.weight[0]
        model.wpe.weight[:] = 0
    assert token_cosine(model, WINDOWS) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_grad_ratio_is_that_of_the_blocks_after_a_backward_pass(norm):
    model = make_model(norm)
    ratio = grad_ratio(model, WINDOWS)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(WINDOWS[:, :-1], WINDOWS[:, 1:]).backward()
    first, last = (math.hypot(*(p.grad.norm() for p in block.parameters())) for block in (model.h[0], model.h[-1]))
    assert ratio == pytest.approx(first / last, rel=1e-5)


def test_the_initial_scale_keeps_the_gain_of_gpt2_at_any_width():
    assert make_config(n_embd=768).init_std == 0.02
    assert make_config(n_embd=32).init_std * math.sqrt(32) == pytest.approx(0.02 * math.sqrt(768))


# Data.


def test_tokens_are_numbered_by_frequency_and_the_rare_ones_alike(data, splits):
    windows, others = (spread_windows(split, 16, count) for split, count in zip(splits, (1000, 200), strict=True))
    numbers = dict(zip(windows.flatten().tolist(), data.train.flatten().tolist(), strict=True))
    counts = torch.bincount(windows[:, 1:].flatten(), minlength=257)
    frequent = sorted(numbers, key=lambda token: (-counts[token], token))
    # The text has more than 40 kinds of bytes: the last number stands for many.
    assert [numbers[token] for token in frequent] == [min(rank, 39) for rank in range(len(frequent))]
    assert len(frequent) > 40
    for before, after in ((windows, data.train), (others, data.val)):
        assert after.tolist() == [[numbers.get(token, 39) for token in row] for row in before.tolist()]


def test_a_large_vocabulary_keeps_every_token_apart(splits):
    numbers = load_study_data(make_config(vocab_size=300), *splits).train
    pairs = set(zip(spread_windows(splits[0], 16, 1000).flatten().tolist(), numbers.flatten().tolist(), strict=True))
    assert len(pairs) == len({token for token, _ in pairs}) == len({number for _, number in pairs})


@pytest.mark.parametrize(("n_tokens", "windows"), [(8000, 500), (16, 1), (159, 9)])
def test_windows_are_spread_over_the_whole_split(splits, n_tokens, windows):
    train, starts = splits[0], [i * 500 // windows * 16 for i in range(windows)]
    assert (train.n_tokens - 1) // 16 == 500
    assert spread_windows(train, 16, n_tokens).tolist() == [train.read(start, 17).tolist() for start in starts]


def test_unigram_losses_are_those_of_guessing_by_the_frequencies_of_training():
    # Targets 1, 1, 2, 1 in training; 1, 2 and the unknown 3 in validation.
    train, val = torch.tensor([[0, 1, 1], [3, 2, 1]]), torch.tensor([[0, 1], [0, 2], [0, 3]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    on_val = -(math.log(0.75) + math.log(0.25) + math.log(0.25)) / 3
    assert unigram_losses(train, val) == (pytest.approx(entropy), pytest.approx(on_val))


# Refusals.


def change_main(**changed) -> dict:
    return {"arms": {"main": {**MAIN, **changed}}}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (change_main(warmup_steps=[5, 40]), r"arms\.main\.warmup_steps=\[5, 40\].*max_steps=40"),
        ({"arms": {"muon": MAIN}}, "arms .* main .*adamw"),
        (change_main(tied=False), "arms .* main .*tied true"),
        (change_main(optimizer="sgd"), r"arms\.main\.optimizer = 'sgd'"),
        ({"train_tokens": 63}, r"train_tokens=63 .* batch_windows × block_size=64; raise"),
        ({"norms": ["preln", "sandwich"]}, r"norm_study\.norms\.1 = 'sandwich'"),
        ({"norms": []}, r"norm_study\.norms = \[\]"),
        (change_main(seeds=[]), r"arms\.main\.seeds = \[\]"),
        (change_main(max_lrs=[1e-3, -1e-3]), r"arms\.main\.max_lrs\.1 = -0\.001"),
        ({"min_lr_fraction": 1.5}, r"norm_study\.min_lr_fraction = 1\.5"),
        ({"vocab_size": 1}, r"norm_study\.vocab_size = 1"),
        (change_main(seeds=[1, 2, 1]), r"arms\.main\.seeds = \[1, 2, 1\].* twice; remove"),
        ({"norms": ["preln", "preln"]}, r"norm_study\.norms = \['preln', 'preln'\].* twice; remove"),
        ({"n_embd": 15}, r"n_embd=15 .* n_head=2; nearest: 1[46]"),
    ],
)
def test_wrong_parameters_are_refused_by_name(changed, named):
    with pytest.raises(UserError, match=named):
        make_config(**changed)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("eval_tokens", "data/tokens/val has 4004 tokens, 250 windows of 16; 20000 tokens, 1250 windows"),
        ("train_tokens", "data/tokens/train has 8008 tokens, 500 windows of 16; .*; ask for 1 to 500"),
    ],
)
def test_the_stage_refuses_too_few_tokens(tmp_path, monkeypatch, key, named):
    monkeypatch.chdir(prepare_study(tmp_path, **{key: 20_000}))
    with pytest.raises(SystemExit, match=f"^norm-study: {named}"):
        norm_study.main()
    assert not (tmp_path / "plots").exists()
