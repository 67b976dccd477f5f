"""Figures of a training run, and what identifies it."""

import math
from pathlib import Path

import numpy as np
import pytest

from gpt2.model.config import GPTConfig
from gpt2.model.flops import training_flops_per_token
from gpt2.pipeline.files import write_json
from gpt2.pipeline.scratch import scratch_folder
from gpt2.train.loop import TrainConfig, TrainResult
from gpt2.train.results import COST_ONLY, SOURCES, run_figures, run_identity, run_speed, windows_in_same_place
from gpt2.train.setup import Run
from tests.closure import import_closure
from tests.training_run import load_parts, prepare_folder

# The names that others read.
CONTRACT = {
    *("steps", "tokens_seen", "train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "hellaswag_acc_norm"),
    *("max_grad_norm", "loss_spikes", "diverged", "diverged_at_step", "unigram_entropy", "stalled"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return load_parts(prepare_folder(tmp_path_factory.mktemp("tokens")))


def make_result(losses: list[float], val_loss: float, diverged_at_step: int = -1) -> TrainResult:
    """A result with these losses and gradient norms 1, 2, …."""
    rows = [[step + 1, 128 * (step + 1), loss, 1e-3, step + 1.0] for step, loss in enumerate(losses)]
    evals = [[0, 0, 5.5, 0.25, 0.25], [len(losses), 128 * len(losses), val_loss, 0.4, 0.6]]
    return TrainResult({"train": rows, "eval": evals, "layers": []}, diverged_at_step)


def test_figures_by_hand(run, tmp_path):
    figures = run_figures(run, make_result([5.0] * 10 + [3.0] * 10 + [2.0] * 10, val_loss=2.5))
    assert figures.keys() >= CONTRACT
    p = np.bincount(run.tokens.read(0, run.tokens.n_tokens)) / run.tokens.n_tokens
    channels = run.model.config.n_embd
    expected = {
        **{"steps": 30, "tokens_seen": 30 * 128, "diverged": 0, "diverged_at_step": -1, "stalled": 0},
        # The last log_interval = 20 steps.
        "train_loss": pytest.approx(2.5),
        **{"val_loss": 2.5, "val_perplexity": pytest.approx(math.exp(2.5))},
        # 4000 bytes of text in four documents are 4004 tokens with the separators.
        "val_bits_per_byte": pytest.approx(2.5 / math.log(2) * 4004 / 4000),
        **{"hellaswag_acc": 0.4, "hellaswag_acc_norm": 0.6, "hellaswag_items": 5},
        **{"max_grad_norm": 30.0, "loss_spikes": 0},
        # 8008 tokens hold 500 windows of 16.
        **{"windows_per_epoch": 500, "epochs": pytest.approx(30 * 8 / 500)},
        "unigram_entropy": pytest.approx(-sum(p[p > 0] * np.log(p[p > 0]))),
        # Without the padding of the vocabulary.
        "n_params": (257 + 16) * channels + 2 * (12 * channels**2 + 13 * channels) + 2 * channels,
    }
    assert {key: figures[key] for key in expected} == expected
    # DVC reads flat maps of scalars.
    assert all(isinstance(value, int | float | str) for value in figures.values())
    write_json(tmp_path / "train.json", figures)


def test_figures_of_a_run_that_diverged_in_its_first_step_are_numbers(run, tmp_path):
    figures = run_figures(run, make_result([], val_loss=5000.0, diverged_at_step=0))
    assert (figures["steps"], figures["diverged"], figures["diverged_at_step"]) == (0, 1, 0)
    assert (figures["train_loss"], figures["max_grad_norm"], figures["stalled"]) == (5000.0, 0.0, 0)
    # Refuses NaN and infinity: the perplexity of this loss is beyond floating point.
    write_json(tmp_path / "train.json", figures)


def test_windows_in_same_place_are_counted_over_two_epochs(run):
    per_epoch, seed = run.order.windows_per_epoch, run.config.seed
    both = np.concatenate([run.order.windows(step, 0, 8) for step in range(2 * per_epoch // 8)])
    assert windows_in_same_place(per_epoch, seed) == (both[:per_epoch] == both[per_epoch:]).sum()
    assert windows_in_same_place(1, seed) == 1


def test_flops_of_gpt2_by_hand():
    config = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, norm="preln")
    # Twelve layers of 7,077,888 weights and the embedding of 38,597,376; attention needs 12 L C T.
    by_hand = 6 * (12 * 7_077_888 + 38_597_376) + 12 * 12 * 768 * 1024
    assert training_flops_per_token(config, config.vocab_size) == by_hand


def test_speed_by_hand(run):
    result = TrainResult(seconds={"step": 8.0, "data": 0.4, "eval": 1.5, "save": 0.5}, steps_timed=100)
    assert run_speed(run, result) == {
        **{"processes": 1, "tokens_per_s": 1600.0},
        **{"data_wait_percent": 5.0, "evaluation_percent": 15.0, "checkpoint_percent": 5.0},
    }
    # A run that had only to write its results measured no step.
    assert run_speed(run, TrainResult())["tokens_per_s"] == 0


def other(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"float32": "bfloat16", "preln": "postln", "adamw": "muon", "none": "head"}[value]
    return value * 2 if isinstance(value, int) else value / 2


def test_a_run_is_identified_by_all_that_decides_its_result_and_by_nothing_else(run):
    def folder_of(config: TrainConfig = run.config, shape: GPTConfig = run.model.config, tokens=run.tokens) -> Path:
        return scratch_folder("train", run_identity(shape, config, tokens), SOURCES)

    # The identity has the length in steps, in whichever way it was given; loaded weights need no state to resume from.
    names = TrainConfig.model_fields.keys() - {"epochs", "init_from"}
    changed = {name: run.config.model_copy(update={name: other(getattr(run.config, name))}) for name in names}
    same = {name for name, config in changed.items() if folder_of(config) == folder_of()}
    assert same == {"micro_batch", "compile", "checkpoint_interval", "log_interval"} == COST_ONLY
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "norm"):
        shape = run.model.config.model_copy(update={name: other(getattr(run.model.config, name))})
        assert folder_of(shape=shape) != folder_of(), name
    assert folder_of(tokens=run.val) != folder_of()


def test_the_code_that_decides_the_weights_is_part_of_the_identity():
    names = {"/".join(source.parts[-2:]) for source in SOURCES}
    # All that the training loop imports, but for what serves every stage.
    closure = import_closure(Path("gpt2/train/loop.py")) - {Path("gpt2/__init__.py")}
    needed = {"/".join(file.parts[-2:]) for file in closure if "pipeline" not in file.parts}
    assert "model/gpt.py" in needed and needed - names == {"train/heartbeat.py"}
