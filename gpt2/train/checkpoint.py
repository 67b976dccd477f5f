"""Checkpoints of a run in progress: atomically written files with weights, optimizer, step and log position.

Their folder, in scratch, is named by a hash of all that decides the result: see scratch.py.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt2.model.dist import Dist
from gpt2.pipeline.files import UserError, atomic_path
from gpt2.train.optim import Optimizer

KEPT = 2
log = logging.getLogger(__name__)


def require_agreement(folder: Path, dist: Dist) -> None:
    """Raise UserError if the main process is about to train another run than this one."""
    if (main := dist.share(folder.name)) != folder.name:
        raise UserError(
            f"rank {dist.rank} has run {folder.name}, the main process {main}: parameters, data/tokens or code differ "
            "between the machines; bring all to the same commit, params.yaml and tokens"
        )


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, state: dict) -> None:
    """Write the state after `state["step"]` steps and remove all but the newest KEPT checkpoints.

    Raises UserError if the file cannot be written; earlier checkpoints are then untouched.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    path = folder / f"step_{state['step']:08d}.safetensors"
    write_tensors(path, tensors, state)
    # Files of later steps are damaged: this run skipped them when it resumed.
    kept = [other for other in _checkpoints(folder) if other.name <= path.name][:KEPT]
    for other in {*_checkpoints(folder)} - {*kept}:
        other.unlink()


def write_tensors(path: Path, tensors: dict[str, Tensor], state: dict | None = None) -> None:
    """Write tensors with a JSON `state` and a digest of both, atomically. Raises UserError if that fails."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state or {})
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"state": text, "digest": _digest(tensors, text)})
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**30
        raise UserError(
            f"{path} cannot be written ({error}); it needs {size:.2f} GiB: make room and run dvc repro, which "
            "resumes from the last checkpoint"
        ) from error


def read_tensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """State and tensors of a file. Raises ValueError if it is damaged or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            text, digest = (file.metadata()[key] for key in ("state", "digest"))
        state = json.loads(text)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{error}") from error
    if _digest(tensors, text) != digest:
        raise ValueError("its content does not match its digest")
    return state, tensors


def read_checkpoints(folder: Path) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """State and tensors of every intact checkpoint, newest first; a damaged one is skipped with a warning."""
    for path in _checkpoints(folder):
        try:
            yield read_tensors(path)
        except ValueError as error:
            log.warning("checkpoint %s is damaged (%s); falling back to the previous one", path, error)


def restore(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of a checkpoint into model and optimizer."""
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)
