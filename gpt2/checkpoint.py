"""Resume state of a run in progress: one file with weights, optimizer, step and log position, whole or absent.

The folder lies in git-ignored scratch under DVC's root, not among DVC's outs, which are deleted before a run; its name
is a fingerprint of all that decides the result, so a checkpoint of another configuration is never found.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt2.files import UserError, atomic_path

KEPT = 2
log = logging.getLogger(__name__)


def scratch_folder(kind: str, identity: dict, sources: Sequence[Path]) -> Path:
    """Folder under DVC's root, which --temp and --queue runs share, named by a digest of `identity` and the sources."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / kind / digest.hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run of the same configuration. Raises UserError if one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run of this configuration holds {folder}; wait for it or stop it") from error
        yield


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the state after `state["step"]` steps and drop all but the newest KEPT checkpoints."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    path = folder / f"step_{state['step']:08d}.safetensors"
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})
    found = _checkpoints(folder)
    newest = found.index(path)
    # Files of later steps are damaged: this run passed them over when it resumed.
    for other in found[:newest] + found[newest + KEPT :]:
        other.unlink()


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore the newest readable checkpoint into model and optimizer; return its state, or None if there is none."""
    for path in _checkpoints(folder):
        try:
            state, tensors = _read(path)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, error)
            continue
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in model.named_parameters():
            prefix = f"optim.{name}."
            values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
        return state
    return None


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return json.loads(file.metadata()["state"]), tensors


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)


def drop(folder: Path) -> None:
    """Remove the resume state of a finished run."""
    shutil.rmtree(folder)
