"""The training loop and its stage: the same result in any number of processes, and after any interruption."""

import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2.model.evaluate import mean_loss
from gpt2.model.weights import load_model
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, read_json
from gpt2.train.checkpoint import KEPT
from gpt2.train.curves import TABLES
from gpt2.train.loop import Stepper, TrainConfig, TrainResult, fit
from gpt2.train.optim import build_optimizer, lr_at
from gpt2.train.setup import Run
from tests.train.conftest import resumed_step
from tests.training_run import (
    LOCAL,
    SECTIONS,
    checkpoint_steps,
    finish,
    kill,
    load_parts,
    outcome,
    prepare_folder,
    read_table,
    scratch_of,
    set_params,
    start,
    train_here,
    wait_for_checkpoint,
)

STEPS = SECTIONS["train"]["max_steps"]
LOSS, LR, GRAD_NORM = (TABLES["train"].index(name) for name in ("loss", "lr", "grad_norm"))


# Killed runs that the tests below resume; undisturbed ones are in conftest.py.


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run killed by SIGKILL after it had written KEPT checkpoints."""
    folder = prepare_folder(tmp_path_factory.mktemp("killed"))
    victim = start(folder)
    wait_for_checkpoint(victim, folder, count=KEPT)
    # Still alive, so that a second trainer meets a first one.
    victim.send_signal(signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as refusal:
            train_here(folder, monkeypatch)
    finally:
        kill(victim)
    (folder / "refusal.txt").write_text(str(refusal.value))
    return folder


@pytest.fixture(scope="module")
def killed_pair(tmp_path_factory) -> Path:
    """A run of two processes, killed together with its launcher after a checkpoint."""
    folder = prepare_folder(tmp_path_factory.mktemp("killed_pair"))
    victim = start(folder, processes=2)
    wait_for_checkpoint(victim, folder)
    kill(victim)
    assert not (folder / "models").exists()
    return folder


@pytest.fixture
def resumable(killed, tmp_path) -> Path:
    """A copy of the killed run."""
    return shutil.copytree(killed, tmp_path / "resumable")


def test_rows_and_files_of_a_run_are_complete(whole):
    tables = {name: whole / f"plots/train/{name}.csv" for name in ("train", "eval")}
    for name, path in tables.items():
        assert path.read_text().split("\n")[0] == ",".join(TABLES[name])
    (rows, evals), config = map(read_table, tables.values()), load_parts(whole).config
    assert rows[:, 0].tolist() == list(range(1, STEPS + 1))
    assert rows[:, LR].tolist() == [lr_at(step, config) for step in range(STEPS)]
    assert evals[:, 0].tolist() == [0, 25, 50, 75, 100, STEPS]
    for table in (rows, evals):
        assert (table[:, 1] == table[:, 0] * config.tokens_per_step).all()
    timed = {"seconds", "peak_memory_gib", "tokens_per_s", "data_wait_percent", "processes"}
    assert read_json(whole / "metrics" / "speed" / "train.json").keys() >= timed


def test_validation_is_that_of_the_untrained_and_of_the_saved_model(whole):
    parts = load_parts(whole)
    evals = read_table(whole / "plots" / "train" / "eval.csv")
    assert evals[0, 2:].tolist() == list(parts.evaluation.measure(parts.model, LOCAL))
    saved = load_model(whole / "models" / "gpt2")
    assert evals[-1, 2:].tolist() == list(parts.evaluation.measure(saved, LOCAL))
    assert evals[-1, 2] == mean_loss(saved, parts.evaluation.windows, parts.config.micro_batch) < evals[0, 2] - 1


def assert_same_up_to_rounding(first: Path, second: Path) -> None:
    """Compare all rows of two runs that add up the parts of a batch in another order."""
    ours, theirs = (read_table(folder / "plots" / "train" / "train.csv") for folder in (first, second))
    # The last bits of a gradient differ, and AdamW passes that on from step to step; measured: 4e-7 and 2e-4.
    np.testing.assert_allclose(ours[:, :GRAD_NORM], theirs[:, :GRAD_NORM], rtol=1e-5)
    np.testing.assert_allclose(ours[:, GRAD_NORM], theirs[:, GRAD_NORM], rtol=1e-2)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    ours, theirs = (read_table(folder / "plots" / "train" / "eval.csv") for folder in (first, second))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_two_processes_train_as_one(whole, whole_pair):
    assert_same_up_to_rounding(whole_pair, whole)
    assert read_json(whole_pair / "metrics" / "speed" / "train.json")["processes"] == 2
    for folder in (whole, whole_pair):
        assert list((folder / ".scratch" / "train").iterdir()) == []


# Interruptions.


def test_killed_and_resumed_equals_uninterrupted_even_with_rows_beyond_the_checkpoint(whole, resumable, resume):
    step = checkpoint_steps(resumable)[-1]
    # As if the kill had come just before the next checkpoint: whole rows and a torn one.
    with open(scratch_of(resumable) / "train.csv", "a") as rows:
        rows.write(f"{step + 1},1,2.5,0.5,0.5\n{step + 2},1,2.")
    with open(scratch_of(resumable) / "eval.csv", "a") as rows:
        rows.write(f"{step},1,2.5,0.5,0.5\n")
    assert resume(resumable) == step
    assert outcome(resumable) == outcome(whole)
    assert list((resumable / ".scratch" / "train").iterdir()) == []


def stop_after_resuming(folder: Path, processes: int) -> int:
    """Resume and send SIGTERM after one more checkpoint; return the exit code."""
    trainer = start(folder, processes)
    seen = wait_for_checkpoint(trainer, folder, after_step=checkpoint_steps(folder)[-1])
    trainer.send_signal(signal.SIGTERM)
    code = trainer.wait(timeout=300)
    assert not (folder / "models").exists()
    # The step under way was finished and saved, rows and all.
    newest = checkpoint_steps(folder)[-1]
    assert seen < newest == read_table(scratch_of(folder) / "train.csv")[-1, 0]
    return code


def test_stopped_by_sigterm_loses_no_step_and_resumes_to_the_same_result(whole, resumable, resume):
    assert stop_after_resuming(resumable, processes=1) == 128 + signal.SIGTERM
    assert len(checkpoint_steps(resumable)) == KEPT
    assert resume(resumable) > 0
    assert outcome(resumable) == outcome(whole)


def test_two_processes_killed_then_stopped_then_resumed_equal_two_undisturbed(whole_pair, killed_pair, tmp_path):
    folder = shutil.copytree(killed_pair, tmp_path / "resumable")
    assert stop_after_resuming(folder, processes=2) != 0
    step = checkpoint_steps(folder)[-1]
    assert resumed_step(finish(start(folder, processes=2), folder)) == step
    assert outcome(folder) == outcome(whole_pair)


def test_one_process_resumes_the_run_of_two(whole, killed_pair, tmp_path, resume):
    folder = shutil.copytree(killed_pair, tmp_path / "resumable")
    assert resume(folder) == checkpoint_steps(killed_pair)[-1]
    assert_same_up_to_rounding(folder, whole)


@pytest.mark.parametrize("damaged", [1, KEPT])
def test_damaged_checkpoints_cost_steps_and_nothing_else(whole, resumable, resume, caplog, damaged):
    intact = [0, *checkpoint_steps(resumable)[:-damaged]]
    paths = sorted(scratch_of(resumable).glob("step_*"))[-damaged:]
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)
    assert resume(resumable) == intact[-1]
    assert all(f"{path.name} is damaged" in caplog.text for path in paths)
    assert outcome(resumable) == outcome(whole)


def test_a_run_with_other_costs_alone_resumes(whole, resumable, resume):
    set_params(resumable, train={"micro_batch": 8, "checkpoint_interval": 3, "log_interval": 7})
    step = checkpoint_steps(resumable)[-1]
    assert resume(resumable) == step
    assert_same_up_to_rounding(resumable, whole)


def test_another_configuration_starts_over_and_leaves_the_checkpoints_alone(resumable, resume):
    left, steps = scratch_of(resumable), checkpoint_steps(resumable)
    set_params(resumable, train={"max_lr": 4e-3})
    assert resume(resumable) == 0
    config = load_parts(resumable).config
    rows = read_table(resumable / "plots" / "train" / "train.csv")
    assert rows[:, LR].tolist() == [lr_at(step, config) for step in range(STEPS)]
    assert scratch_of(resumable) == left and checkpoint_steps(resumable) == steps


def test_a_second_trainer_is_refused(killed):
    assert "another run of this configuration holds" in (killed / "refusal.txt").read_text()


# One step.


def make_stepper(run: Run) -> Stepper:
    return Stepper(run.model, build_optimizer(run.model, run.config), run.config, run.order, LOCAL)


def first_gradients(folder: Path, **changed) -> tuple[list[Tensor], float, float]:
    """Gradients of the first step as the optimizer would get them, the loss and the gradient norm."""
    set_params(folder, train={"grad_clip": 1e9, **changed})
    stepper = make_stepper(run := load_parts(folder))
    loss, stopping = stepper.backward(0, TrainResult())
    assert not stopping
    grad_norm = stepper.clip()
    return [parameter.grad for parameter in run.model.parameters()], loss, grad_norm


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, micro_batch):
    prepare_folder(tmp_path)
    gradients, loss, grad_norm = first_gradients(tmp_path, micro_batch=micro_batch)
    parts = load_parts(tmp_path)
    expected = parts.model(*parts.order.batch(0, 0, 8))
    expected.backward()
    # Sums of 128 fp32 terms: the order of addition decides about the last digits of seven.
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, parts.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_four_micro_batches_of_one_process_are_one_of_four(tmp_path):
    folder = prepare_folder(tmp_path)
    gradients, losses = [], []
    for processes, accumulation in ((1, "4"), (4, "1")):
        log = finish(start(folder, processes, module="tests.first_gradients"), folder)
        printed = log.splitlines()[-1].split()
        assert printed[1] == accumulation
        losses.append(float(printed[3]))
        gradients.append(load_file(folder / "gradients.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    one, four = gradients
    assert one.keys() == four.keys()
    for name, gradient in one.items():
        # Four numbers of fp32 (24 bits) added in two orders differ by a few units of the last place of the largest.
        torch.testing.assert_close(four[name], gradient, rtol=1e-5, atol=2e-7 * gradient.abs().max().item())


def test_the_norm_is_recorded_before_clipping_and_applied_after(tmp_path):
    prepare_folder(tmp_path)
    free, _, free_norm = first_gradients(tmp_path)
    clipped, _, recorded = first_gradients(tmp_path, grad_clip=1e-3)
    assert recorded == free_norm > 0.1
    for small, large in zip(clipped, free, strict=True):
        torch.testing.assert_close(small, large * (1e-3 / free_norm), rtol=1e-4, atol=1e-9)


def fit_here(run: Run, scratch: Path) -> TrainResult:
    return fit(run.model, run.config, run.order, run.evaluation, LOCAL, scratch)


def checkpoint_names(scratch: Path) -> list[str]:
    return sorted(path.stem for path in scratch.glob("step_*"))


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    parts = load_parts(prepare_folder(tmp_path))
    # Finite, and too large to compute with.
    nn.init.constant_(parts.model.h[1].mlp.c_fc.weight, 3e38)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    result = fit_here(parts, tmp_path)
    assert (result.diverged_at_step, result.rows["train"]) == (0, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.model.state_dict().items())


def test_the_update_has_the_learning_rate_of_its_step(tmp_path):
    parts = load_parts(prepare_folder(tmp_path))
    stepper = make_stepper(parts)
    before = parts.model.ln_f.bias.detach().clone()
    stepper.backward(4, TrainResult())
    stepper.update(4)
    # AdamW's first step has the size of the learning rate, which is half of max_lr at step 5 of a warm-up of 10.
    moved = (parts.model.ln_f.bias - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, parts.config.max_lr / 2), rtol=1e-3, atol=0)
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_one_batch_is_learned_by_heart(tmp_path):
    # One epoch is one batch, so that every step sees the same windows.
    prepare_folder(tmp_path, train_bytes=128, train={"max_lr": 3e-2, "max_steps": 120, "eval_interval": 1000})
    parts = load_parts(tmp_path)
    assert parts.order.windows_per_epoch == parts.order.batch_windows
    rows = fit_here(parts, tmp_path).rows["train"]
    assert rows[0][LOSS] > 5 and rows[-1][LOSS] < 0.1


def test_signal_handlers_are_put_back(tmp_path):
    prepare_folder(tmp_path, train={"max_steps": 11})
    parts = load_parts(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit_here(parts, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(
    "numbers",
    [{"precision": "float32"}, {"precision": "bfloat16_mixed"}, {"precision": "bfloat16", "fp8": "head"}],
    ids=lambda numbers: "-".join(numbers.values()),
)
def test_a_run_resumed_twice_has_every_row_once(tmp_path, numbers):
    prepare_folder(tmp_path, train={"max_steps": 24, "checkpoint_interval": 4, "eval_interval": 6, **numbers})
    first = fit_here(load_parts(tmp_path), tmp_path)
    # In any precision the checkpoint holds fp32 weights and moments.
    assert {t.dtype for t in load_file(tmp_path / "step_00000024.safetensors").values()} == {torch.float32}
    assert checkpoint_names(tmp_path) == ["step_00000020", "step_00000024"]
    # Resumes at 20 with the rows to 24 in the log, and writes its checkpoint of 24 behind them or in their place.
    (tmp_path / "step_00000024.safetensors").unlink()
    for steps in (4, 0):
        again = fit_here(load_parts(tmp_path), tmp_path)
        # The first step of a process counts in no rate.
        assert again.steps_timed == max(0, steps - 1)
        assert again.rows == first.rows
        assert checkpoint_names(tmp_path) == ["step_00000020", "step_00000024"]


# Divergence is a result.


@pytest.mark.parametrize(("max_lr", "eval_interval"), [(3.0, 1), (1e4, 1), (1e10, 10), (1e30, 10)])
def test_a_diverging_run_ends_well_and_records_it(tmp_path, resume, max_lr, eval_interval):
    changed = {"max_lr": max_lr, "warmup_steps": 0, "eval_interval": eval_interval, "eval_tokens": 64}
    resume(prepare_folder(tmp_path, train=changed))
    figures = read_json(tmp_path / "metrics" / "train.json")
    rows, evals = (read_table(tmp_path / "plots" / "train" / f"{name}.csv") for name in ("train", "eval"))
    step = figures["diverged_at_step"]
    assert (figures["diverged"], figures["stalled"], figures["steps"]) == (1, 0, len(rows)) and 0 < step < STEPS
    assert rows[:, 0].tolist() == list(range(1, len(rows) + 1)) and np.isfinite(rows).all()
    if eval_interval == 1:
        # The lower rate explodes, which takes a window of losses; the higher one overflows.
        assert len(rows) == step and (step >= 32) == (max_lr < 1e4)
        assert evals[:, 0].tolist() == list(range(step + 1))
    # The saved weights are those of the last row, not of an update without a row.
    saved, run = load_model(tmp_path / "models" / "gpt2"), load_parts(tmp_path)
    assert all(parameter.isfinite().all() for parameter in saved.parameters())
    saved_loss = mean_loss(saved, run.evaluation.windows, run.config.micro_batch)
    assert (figures["model_steps"], figures["val_loss"], saved_loss) == (*evals[-1, [0, 2]], evals[-1, 2])
    assert math.isfinite(saved_loss) and math.isfinite(figures["val_perplexity"])
    assert list((tmp_path / ".scratch" / "train").iterdir()) == []


def test_weights_without_a_finite_validation_give_way_to_the_last_that_had_one(tmp_path, monkeypatch):
    prepare_folder(tmp_path, train={"eval_interval": 10, "max_steps": 40})
    parts = load_parts(tmp_path)
    update, kept = Stepper.update, {}

    def overflow(self, step):
        if step == 10:
            # Evaluated after 10 steps; the 11th makes the weights too large to compute with.
            kept.update({name: tensor.clone() for name, tensor in parts.model.state_dict().items()})
        update(self, step)
        if step == 10:
            nn.init.constant_(parts.model.h[1].mlp.c_fc.weight, 3e38)

    monkeypatch.setattr(Stepper, "update", overflow)
    result = fit_here(parts, tmp_path)
    assert result.diverged_at_step == 11
    assert [row[0] for row in result.rows["train"]] == list(range(1, 12))
    assert [row[0] for row in result.rows["eval"]] == [0, 10]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in parts.model.state_dict().items())


def test_a_resumed_run_diverges_where_the_first_did(tmp_path):
    prepare_folder(tmp_path, train={"max_lr": 3.0, "warmup_steps": 0})
    first = fit_here(load_parts(tmp_path), tmp_path)
    # The newest checkpoint is in the middle of the high losses, which must be counted from the first one on.
    assert (tmp_path / "step_00000024.safetensors").exists()
    (tmp_path / "step_00000032.safetensors").unlink()
    second = fit_here(load_parts(tmp_path), tmp_path)
    assert second.steps_timed == 7
    assert first.diverged_at_step == second.diverged_at_step == 32
    assert first.rows == second.rows


# Refusals.


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokens_per_step": 100}, r"train\.tokens_per_step = 100 .* 32 \(.*16 × 2 × 1\); nearest values: 96, 128$"),
        ({"tokens_per_step": 16384}, r"data/tokens/train has 8008 tokens, .* 16384 \+ 1; lower train\.tokens_per_step"),
        ({"eval_tokens": 5000}, r"data/tokens/val has 4004 tokens; 4993 are needed for 5000"),
        ({"warmup_steps": 120}, r"warmup_steps=120 .* max_steps=120"),
        ({"fp8": "head"}, r"fp8=head needs precision=bfloat16, not float32"),
        ({"micro_batch": 0}, r"tiny\.train\.micro_batch = 0"),
        ({"max_steps": 20, "epochs": 1.0}, r"max_steps=20 and epochs=1\.0: give one"),
        ({"max_steps": None, "epochs": None}, r"max_steps=None and epochs=None: give one"),
        ({"max_steps": None, "epochs": 0.0}, r"tiny\.train\.epochs = 0"),
        ({"max_steps": None, "epochs": 0.1}, r"train\.warmup_steps = 10 .* 6 steps of train\.epochs = 0\.1; shorten"),
    ],
)
def test_wrong_parameters_are_refused_before_any_work(tmp_path, monkeypatch, caplog, changed, named):
    prepare_folder(tmp_path, train=changed)
    with caplog.at_level("INFO"), pytest.raises(SystemExit, match=rf"^train: .*{named}"):
        train_here(tmp_path, monkeypatch)
    # Not even the first validation.
    assert "val loss" not in caplog.text
    assert not any((tmp_path / name).exists() for name in ("models", "plots", "metrics"))


def test_accumulation_follows_from_the_tokens_of_a_step():
    config = params.build(TrainConfig, {**SECTIONS["train"], "tokens_per_step": 768, "micro_batch": 4}, "tiny.train")
    assert config.batch_windows(16) == 48
    assert [config.accumulation(16, processes) for processes in (1, 2, 3, 12)] == [12, 6, 4, 1]
    for processes, near in ((5, "640, 960"), (13, "832")):
        with pytest.raises(UserError, match=rf"= 16 × 4 × {processes}\); nearest values: {near}$"):
            config.accumulation(16, processes)


# The length of a run.


def test_epochs_and_steps_are_two_names_of_one_length(tmp_path, resume, caplog):
    # 500 windows in steps of 8: half an epoch is 31 steps.
    outcomes = []
    for name, length in (("epochs", {"max_steps": None, "epochs": 0.5}), ("steps", {"max_steps": 31, "epochs": None})):
        resume(prepare_folder(tmp_path / name, train=length))
        assert "31 steps of 128 tokens, which are 0.50 epochs of 500 windows of 16 tokens" in caplog.text
        outcomes.append(outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1]
    assert read_json(tmp_path / "epochs" / "metrics" / "train.json")["epochs"] == pytest.approx(0.496)


def test_deterministic_changes_nothing_on_a_cpu(whole, tmp_path):
    # In a process of its own: the setting holds for all that a process does.
    folder = prepare_folder(tmp_path, train={"deterministic": True})
    finish(start(folder), folder)
    assert outcome(folder) == outcome(whole)
