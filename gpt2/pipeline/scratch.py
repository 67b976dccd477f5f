"""Resume state of an unfinished run, in `.scratch/` under DVC's root, ignored by Git and DVC.

It is kept outside DVC's outs because DVC deletes those before a run. A folder is named by a hash of all that decides
the result, so the state of another configuration is never resumed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt2.pipeline.files import UserError

LIBRARY = Path(__file__).resolve().parent.parent


def source_files(*names: str, without: Sequence[str] = ()) -> list[Path]:
    """Python files of the library: whole packages ("model") and single files ("hellaswag/items.py"), sorted.

    `without` lists files to leave out. Raises FileNotFoundError if a name does not exist.
    """
    found: set[Path] = set()
    for name in names:
        path = LIBRARY / name
        found |= set(path.rglob("*.py")) if path.is_dir() else {path.resolve(strict=True)}
    return sorted(found - {(LIBRARY / name).resolve(strict=True) for name in without})


def scratch_root() -> Path:
    """`.scratch` under DVC's root, which --temp and --queue runs share."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"


def scratch_folder(kind: str, identity: dict, sources: Sequence[Path]) -> Path:
    """Folder of a run, named by a digest of `identity` and the sources."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return scratch_root() / kind / digest.hexdigest()[:16]


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


def drop(folder: Path) -> None:
    """Remove the resume state of a finished run."""
    shutil.rmtree(folder)


@contextmanager
def staged(target: Path, scratch: Path) -> Iterator[Path]:
    """Yield a folder inside `scratch`, with the whole files that a killed run left there, to be filled; when the block
    succeeds, it replaces `target` in one step and `scratch` is gone.

    Half-written files go first, and so does what runs of another identity left beside `scratch` and no run holds. If
    the block raises, the folder stays for the next try. Raises UserError if another run holds `scratch`.
    """
    for other in scratch.parent.glob("*"):
        if other != scratch:
            _drop_abandoned(other)
    with locked(scratch):
        folder = scratch / target.name
        folder.mkdir(exist_ok=True)
        for half_written in [*scratch.glob(".*.tmp"), *folder.glob(".*.tmp")]:
            half_written.unlink()
        yield folder
        _move(folder, target)
        drop(scratch)


def _drop_abandoned(folder: Path) -> None:
    try:
        with locked(folder):
            drop(folder)
    except (UserError, OSError):
        pass  # Another run holds it, or has just removed it.


def _move(folder: Path, target: Path) -> None:
    try:
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copytree(folder, target)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be moved to {target} ({error}); make room there and run dvc repro, which finds it done"
        ) from error
