"""Checkpoints: complete, atomic, found by the run that wrote them and by no other."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.train import checkpoint
from gpt2.train.checkpoint import KEPT, read_checkpoints, require_agreement, restore, save_checkpoint
from gpt2.train.optim import OptimConfig, build_optimizer
from tests.training_run import ADAM, SHAPE

CONFIG = GPTConfig(**SHAPE, vocab_size=97, norm="preln")
SCHEDULE = OptimConfig(**ADAM, max_steps=100, max_lr=1e-2, min_lr=1e-3, warmup_steps=0)


class Trainer:
    """A model and its optimizer, trained on random tokens that depend on the step alone."""

    def __init__(self, seed: int = 0, optimizer: str = "adamw"):
        self.model = GPT(CONFIG, seed)
        self.optimizer = build_optimizer(self.model, SCHEDULE.model_copy(update={"optimizer": optimizer}))

    def train(self, *steps: int) -> "Trainer":
        for step in steps:
            idx = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(step))
            self.model(idx[:, :-1], idx[:, 1:]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def save(self, folder: Path, step: int) -> None:
        save_checkpoint(folder, self.model, self.optimizer, {"step": step, "log_bytes": {"train.csv": 10 * step}})

    def load(self, folder: Path) -> dict | None:
        for state, tensors in read_checkpoints(folder):
            restore(self.model, self.optimizer, tensors)
            return state
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights and of all that the optimizer holds."""
        found = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}/{key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("optimizer", "held"),
    [("adamw", {"step", "exp_avg", "exp_avg_sq"}), ("muon", {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"})],
)
def test_weights_and_optimizer_are_restored_exactly_and_training_continues_as_if_never_stopped(
    tmp_path, optimizer, held
):
    first = Trainer(optimizer=optimizer).train(0, 1, 2)
    first.save(tmp_path, 3)
    second = Trainer(seed=5, optimizer=optimizer)
    assert second.load(tmp_path) == {"step": 3, "log_bytes": {"train.csv": 30}}
    assert_same(second.tensors(), first.tensors())
    assert {name.split("/")[1] for name in first.tensors() if "/" in name} == held
    assert_same(second.train(3, 4).tensors(), first.train(3, 4).tensors())


def test_a_folder_without_checkpoints_changes_nothing(tmp_path):
    trainer, untouched = Trainer(), Trainer()
    assert trainer.load(tmp_path) is None and trainer.load(tmp_path / "absent") is None
    assert_same(trainer.tensors(), untouched.tensors())


def test_only_the_newest_are_kept(tmp_path):
    trainer = Trainer()
    for step in range(98, 98 + KEPT + 2):
        trainer.save(tmp_path, step)
    # Across the change from two digits to three.
    assert files_in(tmp_path) == [f"step_{step:08d}.safetensors" for step in range(100, 100 + KEPT)]
    assert trainer.load(tmp_path)["step"] == 99 + KEPT


def test_the_file_is_safetensors_and_plain_json(tmp_path):
    trainer = Trainer().train(0)
    trainer.save(tmp_path, 1)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 1
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    # Nothing but tensors and JSON: loading it runs no code.
    assert len(stored) == len(trainer.tensors())
    assert torch.equal(stored["model.wte.weight"], trainer.model.wte.weight)
    assert torch.equal(stored["optim.wte.weight.exp_avg"], trainer.optimizer.state[trainer.model.wte.weight]["exp_avg"])


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "foreign": lambda content: b"no checkpoint" * 100,
    "zeros": lambda content: bytes(len(content)),
    "a bit of the last weight": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a digit of the state": lambda content: content.replace(b'\\"step\\": 2', b'\\"step\\": 3'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_gives_way_to_the_one_before(tmp_path, caplog, damage):
    trainer = Trainer()
    trainer.train(0).save(tmp_path, 1)
    good = trainer.tensors()
    trainer.train(1).save(tmp_path, 2)
    newest = tmp_path / "step_00000002.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(damaged := damage(whole))
    assert damaged != whole
    resumed = Trainer(seed=5)
    assert resumed.load(tmp_path)["step"] == 1
    assert_same(resumed.tensors(), good)
    assert [(record.levelno, str(newest) in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_all_damaged_starts_over_and_the_new_run_keeps_its_own_checkpoints(tmp_path, caplog):
    trainer = Trainer()
    for step in (8, 9):
        trainer.save(tmp_path, step)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    fresh = Trainer(seed=5)
    before = fresh.tensors()
    assert fresh.load(tmp_path) is None
    assert_same(fresh.tensors(), before)
    assert len(caplog.records) == 2
    for step in (1, 2):
        fresh.train(step).save(tmp_path, step)
    # The damaged files have higher numbers, and must not pass for newer than what the run writes now.
    assert files_in(tmp_path) == ["step_00000001.safetensors", "step_00000002.safetensors"]
    resumed = Trainer()
    assert resumed.load(tmp_path)["step"] == 2
    assert_same(resumed.tensors(), fresh.tensors())


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_temporary_file(tmp_path, monkeypatch):
    def write_half(tensors, path, metadata):
        Path(path).write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = Trainer().train(0)
    trainer.save(tmp_path, 1)
    before = trainer.tensors()
    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(UserError, match=r"step_00000002\.safetensors .*No space left.* 0\.00 GiB: make room"):
        trainer.train(1).save(tmp_path, 2)
    assert files_in(tmp_path) == ["step_00000001.safetensors"]
    resumed = Trainer(seed=5)
    assert resumed.load(tmp_path)["step"] == 1
    assert_same(resumed.tensors(), before)


class Second(Dist):
    """A process whose main one has the run `abc`."""

    def share(self, value):
        return "abc"


def test_machines_that_would_train_different_runs_are_refused():
    second = Second(1, 0, 2, torch.device("cpu"))
    require_agreement(Path(".scratch/train/abc"), second)
    with pytest.raises(UserError, match="rank 1 has run def, the main process abc"):
        require_agreement(Path(".scratch/train/def"), second)
