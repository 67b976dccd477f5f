"""Resume state of an unfinished run, in `.scratch/` under DVC's root, ignored by Git and DVC.

It is kept outside DVC's outs because DVC deletes those before a run. A folder is named by a hash of all that decides
the result, so the state of another configuration is never resumed.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    """Lock the folder against a second run of the same configuration. Raises UserError if one holds it."""
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
    """Yield a folder inside `scratch` to fill, which holds the whole files that a killed run left there.

    When the block succeeds, the folder replaces `target` and `scratch` is removed. If it raises, the folder stays for
    the next try. Half-written files are removed first, and so are the folders of other identities that no run holds.
    Raises UserError if another run holds `scratch`.
    """
    for other in scratch.parent.glob("*"):
        # Another run may hold it, or have just removed it.
        if other != scratch:
            with suppress(UserError, OSError), locked(other):
                drop(other)
    with locked(scratch):
        folder = scratch / target.name
        folder.mkdir(exist_ok=True)
        for half_written in [*scratch.glob(".*.tmp"), *folder.glob(".*.tmp")]:
            half_written.unlink()
        yield folder
        try:
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            # A copy where the two are on different file systems.
            shutil.move(folder, target)
        except OSError as error:
            remedy = "make room there and run dvc repro, which finds it done"
            raise UserError(f"{folder} cannot be moved to {target} ({error}); {remedy}") from error
        drop(scratch)
