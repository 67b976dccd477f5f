"""Figures of a training run, what identifies it, and the rules that call it spiking, diverged or stalled."""

import math
from pathlib import Path

import numpy as np
import pytest

from gpt2.data.shards import TokenSet
from gpt2.model.config import GPTConfig
from gpt2.model.flops import training_flops_per_token
from gpt2.pipeline.files import write_json
from gpt2.pipeline.scratch import scratch_folder
from gpt2.train.loop import TrainConfig, TrainResult
from gpt2.train.results import COST_ONLY, SOURCES, run_figures, run_identity, run_speed, windows_in_same_place
from gpt2.train.stability import (
    DIVERGENCE_NATS,
    SPIKE_NATS,
    STALL_NATS,
    WINDOW,
    DivergenceWatch,
    count_spikes,
    has_stalled,
)
from tests.closure import import_closure
from tests.training_run import LOCAL, Parts, load_parts, prepare_folder

# The names that others read, with the report among them.
CONTRACT = {
    *("steps", "tokens_seen", "train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "hellaswag_acc_norm"),
    *("max_grad_norm", "loss_spikes", "diverged", "diverged_at_step", "unigram_entropy", "stalled"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def parts(folder) -> Parts:
    return load_parts(folder)


def open_tokens(folder: Path) -> tuple[TokenSet, TokenSet]:
    return TokenSet(folder / "data" / "tokens", "train"), TokenSet(folder / "data" / "tokens", "val")


def make_result(losses: list[float], val_loss: float, diverged_at_step: int = -1) -> TrainResult:
    """A result with these losses and gradient norms 1, 2, …."""
    rows = [[step + 1, 128 * (step + 1), loss, 1e-3, step + 1.0] for step, loss in enumerate(losses)]
    evals = [[0, 0, 5.5, 0.25, 0.25], [len(losses), 128 * len(losses), val_loss, 0.4, 0.6]]
    return TrainResult({"train": rows, "eval": evals, "layers": []}, diverged_at_step)


def figures_of(folder: Path, result: TrainResult) -> dict[str, float]:
    parts = load_parts(folder)
    return run_figures(result, parts.config, parts.model, *open_tokens(folder), parts.order.windows_per_epoch, 5)


def test_figures_by_hand(folder, tmp_path):
    losses = [5.0] * 10 + [3.0] * 10 + [2.0] * 10
    figures = figures_of(folder, make_result(losses, val_loss=2.5))
    assert figures.keys() >= CONTRACT
    assert (figures["steps"], figures["tokens_seen"], figures["diverged"], figures["diverged_at_step"]) == (
        *(30, 30 * 128, 0, -1),
    )
    # The last log_interval = 20 steps.
    assert figures["train_loss"] == pytest.approx(2.5)
    assert (figures["val_loss"], figures["val_perplexity"]) == (2.5, pytest.approx(math.exp(2.5)))
    # 4000 bytes of text in four documents are 4004 tokens with the separators.
    assert figures["val_bits_per_byte"] == pytest.approx(2.5 / math.log(2) * 4004 / 4000)
    assert (figures["hellaswag_acc"], figures["hellaswag_acc_norm"], figures["hellaswag_items"]) == (0.4, 0.6, 5)
    assert (figures["max_grad_norm"], figures["loss_spikes"], figures["stalled"]) == (30.0, 0, 0)
    # 8008 tokens hold 500 windows of 16.
    assert (figures["windows_per_epoch"], figures["epochs"]) == (500, pytest.approx(30 * 8 / 500))
    train, _ = open_tokens(folder)
    p = np.bincount(train.read(0, train.n_tokens)) / train.n_tokens
    assert figures["unigram_entropy"] == pytest.approx(-sum(p[p > 0] * np.log(p[p > 0])))
    # DVC reads flat maps of scalars.
    assert all(isinstance(value, int | float | str) for value in figures.values())
    write_json(tmp_path / "train.json", figures)


def test_figures_of_a_run_that_diverged_in_its_first_step_are_numbers(folder, tmp_path):
    figures = figures_of(folder, make_result([], val_loss=5000.0, diverged_at_step=0))
    assert (figures["steps"], figures["diverged"], figures["diverged_at_step"]) == (0, 1, 0)
    assert (figures["train_loss"], figures["max_grad_norm"], figures["stalled"]) == (5000.0, 0.0, 0)
    # Refuses NaN and infinity: the perplexity of this loss is beyond floating point.
    write_json(tmp_path / "train.json", figures)


def test_number_of_parameters_leaves_the_padding_out(folder):
    shape = load_parts(folder).model.config
    channels = shape.n_embd
    by_hand = (257 + 16) * channels + 2 * (12 * channels**2 + 13 * channels) + 2 * channels
    assert figures_of(folder, make_result([5.0], 5.0))["n_params"] == by_hand


def test_windows_in_same_place_are_counted_over_two_epochs(parts):
    per_epoch, seed = parts.order.windows_per_epoch, parts.config.seed
    both = np.concatenate([parts.order.windows(step, 0, 8) for step in range(2 * per_epoch // 8)])
    assert windows_in_same_place(per_epoch, seed) == (both[:per_epoch] == both[per_epoch:]).sum()
    assert windows_in_same_place(1, seed) == 1


def test_flops_of_gpt2_by_hand():
    config = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, norm="preln")
    # Twelve layers of 7,077,888 weights and the embedding of 38,597,376; attention does 12 L C T.
    assert (
        training_flops_per_token(config, config.vocab_size) == 6 * (12 * 7_077_888 + 38_597_376) + 12 * 12 * 768 * 1024
    )


def test_speed_by_hand(parts):
    result = TrainResult(
        seconds={"step": 8.0, "data": 0.4, "eval": 1.5, "save": 0.5},
        steps_timed=100,
    )
    assert run_speed(result, parts.config, parts.model.config, LOCAL) == {
        "processes": 1,
        "tokens_per_s": 1600.0,
        "data_wait_percent": 5.0,
        "evaluation_percent": 15.0,
        "checkpoint_percent": 5.0,
    }
    # A run that had only to write its results measured no step.
    assert run_speed(TrainResult(), parts.config, parts.model.config, LOCAL)["tokens_per_s"] == 0


def other(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"float32": "bfloat16", "preln": "postln", "adamw": "muon"}[value]
    return value * 2 if isinstance(value, int) else value / 2


def folder_of(shape: GPTConfig, config: TrainConfig, tokens: TokenSet) -> Path:
    return scratch_folder("train", run_identity(shape, config, tokens), SOURCES)


def test_a_run_is_known_by_all_that_decides_its_result_and_by_nothing_else(folder, parts):
    tokens, val = open_tokens(folder)
    shape, config = parts.model.config, parts.config
    expected = folder_of(shape, config, tokens)
    # A run is known in steps, however its length was given; loaded weights need no state to resume from.
    names = TrainConfig.model_fields.keys() - {"epochs", "init_from"}
    changes = {name: {name: other(getattr(config, name))} for name in names}
    same = {name for name in changes if folder_of(shape, config.model_copy(update=changes[name]), tokens) == expected}
    assert same == {"micro_batch", "compile", "checkpoint_interval", "log_interval"} == COST_ONLY
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "norm"):
        changed = shape.model_copy(update={name: other(getattr(shape, name))})
        assert folder_of(changed, config, tokens) != expected, name
    assert folder_of(shape, config, val) != expected


def test_the_code_that_decides_the_weights_is_part_of_the_identity():
    names = {"/".join(source.parts[-2:]) for source in SOURCES}
    assert names >= {"data/order.py", "model/loss.py", "model/gpt.py", "train/optim.py", "train/stability.py"}
    # All that the training loop imports, but for what serves every stage.
    closure = import_closure(Path("gpt2/train/loop.py")) - {Path("gpt2/__init__.py")}
    needed = {"/".join(file.parts[-2:]) for file in closure if "pipeline" not in file.parts}
    assert needed - names == {"train/heartbeat.py"}


# Stability.


def steady(level: float = 3.0, count: int = WINDOW, deviation: float = 0.0) -> list[float]:
    """Losses with this mean and standard deviation."""
    return [level + deviation * (-1) ** step for step in range(count)]


SPIKES = {
    "above the nats": ([*steady(), 3.0 + SPIKE_NATS + 0.01], 1),
    "below the nats": ([*steady(), 3.0 + SPIKE_NATS - 0.01], 0),
    "beyond five deviations": ([*steady(deviation=0.1), 3.51], 1),
    "within five deviations": ([*steady(deviation=0.1), 3.49], 0),
    "no full window before it": ([*steady(count=WINDOW - 1), 9.0], 0),
    "a long one is one": ([*steady(), *steady(9.0, 50)], 1),
    "two": ([*steady(), 9.0, 3.0, 9.0, 9.0, 3.0], 2),
    "a spike does not raise the level": ([*steady(), *steady(9.0, 40), 3.0, 3.5], 2),
    "falling": (list(np.linspace(10, 2, 200)), 0),
    "rising slowly": (list(np.linspace(2, 10, 200)), 0),
    "no losses": ([], 0),
}


@pytest.mark.parametrize(("losses", "spikes"), SPIKES.values(), ids=SPIKES)
def test_spikes(losses, spikes):
    assert count_spikes(losses) == spikes


def diverges_at(losses: list[float], grad_norms: list[float] | None = None) -> int:
    """Index at which a watch asks to stop, -1 if never."""
    watch = DivergenceWatch()
    for step, (loss, grad_norm) in enumerate(zip(losses, grad_norms or [1.0] * len(losses), strict=True)):
        if watch.update(loss, grad_norm):
            return step
    return -1


HIGH = 3.0 + DIVERGENCE_NATS + 0.01


ALMOST = HIGH - 0.02
DIVERGENCES = {
    "a whole window": ([*steady(count=100), *steady(HIGH)], 99 + WINDOW),
    "one good step breaks it": ([*steady(count=100), *steady(HIGH)[1:], 3.0, *steady(HIGH)[1:]], -1),
    "too little": ([*steady(count=100), *steady(ALMOST, 200)], -1),
    # No mean of a whole window yet: the first loss stands for it.
    "from the start": ([3.0, *steady(HIGH)], WINDOW),
    "too little from the start": ([3.0, *steady(ALMOST, 100)], -1),
    "the lowest mean counts": ([*steady(2.0, 40), *np.linspace(2, 2.9, 500), *steady(3.1)], 539 + WINDOW),
    "falling": (list(np.linspace(11, 3, 500)), -1),
    "NaN": ([3.0, math.nan], 1),
    "infinity at once": ([math.inf], 0),
}


@pytest.mark.parametrize(("losses", "step"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_divergence(losses, step):
    assert diverges_at(losses) == step


def test_a_gradient_that_is_not_finite_is_divergence():
    assert diverges_at([3.0, 3.0, 3.0], [1.0, math.inf, 1.0]) == 1
    assert diverges_at([3.0, 3.0, 3.0], [1.0, 1.0, math.nan]) == 2


def test_a_watch_that_is_fed_the_rows_again_goes_on_as_the_first_did():
    losses = [*steady(count=70), *steady(HIGH)]
    for killed in (0, 1, 31, 33, 70, 100):
        watch = DivergenceWatch()
        assert not any(watch.update(loss, 1.0) for loss in losses[:killed])
        assert [watch.update(loss, 1.0) for loss in losses[killed:]].index(True) == len(losses) - 1 - killed


def test_stalled_is_near_or_above_the_unigram_entropy():
    assert has_stalled(3.0, 3.0) and has_stalled(3.0 - STALL_NATS + 0.01, 3.0) and has_stalled(9.0, 3.0)
    assert not has_stalled(3.0 - STALL_NATS - 0.01, 3.0)
