"""The norm study: several workers find what one process finds, and its runs and diagnosis are what they should be."""

import csv
import json
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
    NormSetting,
    NormStudyConfig,
    RunResult,
    StudyData,
    grad_ratio,
    load_study_data,
    token_cosine,
    train_norm_run,
    unigram_losses,
)
from gpt2.norm_study.tables import (
    LOSS_CAP,
    average_curves,
    study_figures,
    tabulate_curves,
    tabulate_runs,
    tabulate_settings,
)
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
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
    "max_steps": 40,
    "min_lr_fraction": 0.1,
    "batch_windows": 4,
    "micro_batch": 4,
    "precision": "float32",
    "train_tokens": 1000,
    "eval_tokens": 200,
    "vocab_size": 40,
}


def make_config(**changed) -> NormStudyConfig:
    return params.build(NormStudyConfig, {**SECTION, **changed}, "tiny.norm_study")


def prepare_study(folder: Path, threads: int = 1, **changed) -> Path:
    """A folder in which the stage can run."""
    prepare_folder(folder)
    sections = {"hardware": {**SECTIONS["hardware"], "threads": threads}, "norm_study": {**SECTION, **changed}}
    (folder / "params.yaml").write_text(json.dumps({"norm": "preln", "scale": "tiny", "tiny": sections}))
    return folder


def load_data(folder: Path, config: NormStudyConfig) -> StudyData:
    return load_study_data(config, *(TokenSet(folder / "data" / "tokens", split) for split in ("train", "val")))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder in which the stage has run, with two workers."""
    folder = prepare_study(tmp_path_factory.mktemp("study"), threads=2)
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
        NormSetting(name, norm, max_lr, warmup_steps, seed)
        for name, arm in config.arms.items()
        for norm in config.norms
        for max_lr in arm.max_lrs
        for warmup_steps in arm.warmup_steps
        for seed in arm.seeds
    ]
    return [train_norm_run(setting, config, data, CPU) for setting in settings]


def read_rows(study: Path, name: str) -> list[list[str]]:
    with open(study / "plots" / "norm_study" / f"{name}.csv", newline="") as table:
        return list(csv.reader(table))


def read_dicts(study: Path, name: str) -> list[dict[str, str]]:
    header, *rows = read_rows(study, name)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_two_workers_find_exactly_what_one_process_finds(study, results):
    config = make_config()
    data = load_data(study, config)
    runs, curves = tabulate_runs(results, data), tabulate_curves(results)
    tables = {
        "runs": runs,
        "table": tabulate_settings(runs),
        "curves": curves,
        "loss": average_curves(curves, config, "loss"),
        "grad_norm": average_curves(curves, config, "grad_norm"),
    }
    for name, table in tables.items():
        # Rows as their text in a file, where floats are exact.
        rows = [[str(value) for value in row] for row in table.itertuples(index=False)]
        assert read_rows(study, name) == [[*table.columns], *rows], name
    assert read_json(study / "metrics" / "norm_study.json") == study_figures(runs, config, data)


def test_runs_stand_in_the_order_of_their_settings(study):
    settings = [row[:5] for row in read_rows(study, "runs")[1:]]
    main = [["main", n, lr, "5", seed] for n in NORMS for lr in ("0.005", "100000.0") for seed in ("1", "2")]
    assert settings == [*main, *([arm, n, "0.005", "5", "1"] for arm in ("own_output", "muon") for n in NORMS)]


def test_a_run_that_diverges_is_recorded_with_the_steps_it_had(study, results):
    curves = read_rows(study, "curves")[1:]
    for run, result in zip(read_dicts(study, "runs"), results, strict=True):
        steps = [row for row in curves if row[:5] == [*run.values()][:5]]
        diverged = run["max_lr"] == "100000.0"
        assert (run["diverged"], run["diverged_at_step"]) == (("1", str(len(steps))) if diverged else ("0", "-1"))
        assert len(steps) == len(result.curve.losses) < 40 if diverged else len(steps) == 40
        assert math.isfinite(float(run["val_loss"])) and all(math.isfinite(float(row[6])) for row in steps)
        # It broke off: whether it would have learned is not known.
        assert not (diverged and int(run["stalled"]))


def test_the_other_runs_learn_and_seeds_differ(results):
    calm = [result for result in results if result.setting.max_lr < 1]
    assert all(result.val_loss < result.curve.losses[0] - 0.3 for result in calm)
    main = [result for result in calm if result.setting.arm == "main"]
    assert len({result.curve.losses[0] for result in main}) == len(main) == 6


def test_an_arm_changes_its_output_matrix_or_its_optimizer_alone(results):
    firsts = {(r.setting.arm, r.setting.norm): r for r in results if (r.setting.max_lr, r.setting.seed) == (5e-3, 1)}
    for norm in NORMS:
        main, own, muon = (firsts[arm, norm].curve.losses for arm in ("main", "own_output", "muon"))
        assert main[0] == muon[0] != own[0] and main[1:] != muon[1:]


# Data, diagnosis and single runs.


def make_model(norm: str = "preln", **changed) -> GPT:
    return GPT(GPTConfig(**SHAPE, vocab_size=50, norm=norm), 1, **changed)


def make_windows() -> torch.Tensor:
    return torch.randint(50, (6, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_have_cosine_one_where_all_embeddings_are_equal_and_less_where_they_are_random(norm):
    model, windows = make_model(norm, init_std=0.1), make_windows()
    hidden = model.hidden(windows[:, :-1]).detach()
    pairs = [
        torch.cosine_similarity(window[i], window[j], dim=0).item()
        for window in hidden
        for i in range(16)
        for j in range(i)
    ]
    assert token_cosine(model, windows) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert np.mean(pairs) < 0.1
    with torch.no_grad():
        model.wte.weight[:] = model.wte.weight[0]
        model.wpe.weight[:] = 0
    assert token_cosine(model, windows) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_ratio_is_that_of_the_blocks_after_a_backward_pass(norm):
    model, windows = make_model(norm), make_windows()
    ratio = grad_ratio(model, windows)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(windows[:, :-1], windows[:, 1:]).backward()
    first, last = (math.hypot(*(p.grad.norm() for p in block.parameters())) for block in (model.h[0], model.h[-1]))
    assert ratio == pytest.approx(first / last, rel=1e-5)


def test_the_initial_scale_keeps_the_gain_of_gpt2_at_any_width():
    assert make_config(n_embd=768).init_std == 0.02
    assert make_config(n_embd=32).init_std * math.sqrt(32) == pytest.approx(0.02 * math.sqrt(768))


def test_learning_rates_beyond_all_bounds_are_recorded_results(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare_study(tmp_path, arms={"main": {**MAIN, "max_lrs": [1e10, 1e30], "seeds": [1]}}))
    norm_study.main()
    figures = read_json(tmp_path / "metrics" / "norm_study.json")
    assert all(math.isfinite(value) for value in figures.values())
    runs = read_dicts(tmp_path, "runs")
    assert len(runs) == 6 and {(run["diverged"], run["stalled"]) for run in runs} == {("1", "0")}
    assert all(0 < int(run["diverged_at_step"]) < 40 for run in runs)
    for norm in NORMS:
        losses = [float(run["val_loss"]) for run in runs if run["norm"] == norm]
        mean = np.mean([loss for loss in losses if math.isfinite(loss)] or [math.inf])
        assert figures[f"{norm}_val_loss"] == pytest.approx(min(mean, LOSS_CAP))
        assert (figures[f"{norm}_diverged"], figures[f"{norm}_lost_runs"]) == (2, 2)
    assert not all(math.isfinite(float(run["val_loss"])) for run in runs)


def test_weights_that_only_the_validation_finds_broken_are_a_divergence_after_the_last_step(study):
    config = make_config(max_steps=1, arms={"main": {**MAIN, "warmup_steps": [0]}})
    result = train_norm_run(NormSetting("main", "preln", 1e30, 0, 1), config, load_data(study, config), CPU)
    assert (len(result.curve.losses), result.curve.diverged_at_step) == (1, 1)
    assert not math.isfinite(result.val_loss) and math.isfinite(result.curve.max_grad_norm)


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
    result = train_norm_run(NormSetting("main", "preln", 5e-3, 5, 1), config, data, CPU)
    guessing = replace(result, val_loss=data.unigram_val_loss)
    learned = replace(result, val_loss=data.unigram_val_loss - 0.11)
    broken = replace(guessing, curve=replace(guessing.curve, diverged_at_step=3))
    assert [*tabulate_runs([guessing, learned, broken], data)["stalled"]] == [1, 0, 0]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_has_the_weights_and_the_data_order_of_its_seed(study, seed):
    config = make_config()
    data = load_data(study, config)
    setting = NormSetting("main", "deepnorm", 1e-3, 5, seed)
    result = train_norm_run(setting, config, data, CPU)
    shape = GPTConfig(**SHAPE, vocab_size=data.vocab_size, norm="deepnorm")
    model = GPT(shape, seed, init_std=config.init_std)
    batch = data.train[sample_windows(np.arange(4), len(data.train), seed)]
    assert result.curve.losses[0] == model(batch[:, :-1], batch[:, 1:]).item()
    assert result == train_norm_run(setting, config, data, CPU)


def test_micro_batches_that_do_not_divide_the_batch_change_rounding_alone(study):
    whole, parts = make_config(), make_config(micro_batch=3)
    data = load_data(study, whole)
    setting = NormSetting("main", "preln", 1e-3, 5, 1)
    first, second = (train_norm_run(setting, config, data, CPU).curve for config in (whole, parts))
    # The parts of three and one are summed in another order.
    np.testing.assert_allclose(second.losses[:2], first.losses[:2], rtol=1e-6)
    np.testing.assert_allclose(second.grad_norms[:2], first.grad_norms[:2], rtol=1e-5)
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-3)


def change_main(**changed) -> dict:
    return {"arms": {"main": {**MAIN, **changed}}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change_main(warmup_steps=[5, 40]), r"arms\.main\.warmup_steps=\[5, 40\] must be less than max_steps=40"),
        ({"arms": {"muon": MAIN}}, "arms must have an arm main with optimizer adamw and tied true; add it"),
        (change_main(tied=False), "arms must have an arm main with optimizer adamw and tied true; add it"),
        (change_main(optimizer="sgd"), r"tiny\.norm_study\.arms\.main\.optimizer = 'sgd'"),
        ({"train_tokens": 63}, r"train_tokens=63 must fill one batch of batch_windows × block_size = 64; raise it"),
        ({"norms": ["preln", "sandwich"]}, r"tiny\.norm_study\.norms\.1 = 'sandwich'"),
        ({"norms": []}, r"tiny\.norm_study\.norms = \[\]"),
        (change_main(seeds=[]), r"tiny\.norm_study\.arms\.main\.seeds = \[\]"),
        (change_main(max_lrs=[1e-3, -1e-3]), r"tiny\.norm_study\.arms\.main\.max_lrs\.1 = -0\.001"),
        ({"min_lr_fraction": 1.5}, r"tiny\.norm_study\.min_lr_fraction = 1\.5"),
        ({"vocab_size": 1}, r"tiny\.norm_study\.vocab_size = 1"),
        (change_main(seeds=[1, 2, 1]), r"seeds=\[1, 2, 1\] must not name a value twice; remove one"),
        ({"norms": ["preln", "preln"]}, r"norms=\['preln', 'preln'\] must not name a value twice; remove one"),
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
    monkeypatch.chdir(prepare_study(tmp_path, **{key: 20_000}))
    with pytest.raises(SystemExit, match=f"^norm-study: {message}"):
        norm_study.main()
    assert not (tmp_path / "plots").exists()
