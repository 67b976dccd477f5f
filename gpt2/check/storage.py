"""Where the bytes of a run go: workspace, DVC's cache with its links, downloads, checkpoints of a run in progress."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvc.config import Config, ConfigError
from dvc.fs import generic, localfs
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from gpt2.check.workload import Workload
from gpt2.pipeline.files import UserError

# The large outs, by the stage that writes them.
OUTS = {
    "prepare": Path("data/corpus"),
    "tokenize": Path("data/tokens"),
    "train": Path("models/gpt2"),
    "prune": Path("models/pruned"),
}
CACHE, SCRATCH = Path(".dvc/cache"), Path(".scratch")
# DVC's choice where cache.type is not set, and the types that a file system may lack.
DEFAULT_LINKS = ("reflink", "copy")
LINKS = ("reflink", "hardlink", "symlink")


@dataclass(frozen=True)
class Links:
    """DVC's cache: its folder, the link types it may use in order, and those that work from there to the workspace."""

    cache: Path
    configured: Sequence[str]
    works: Sequence[str]

    @property
    def used(self) -> str | None:
        """What DVC does with an out; None if nothing configured works."""
        return next((link for link in self.configured if link in (*self.works, "copy")), None)


@dataclass(frozen=True)
class Demand:
    """Bytes that a place on the disk will have to take."""

    name: str
    path: Path
    n_bytes: float


def find_links(root: Path) -> Links:
    """Read DVC's configuration and try each type of link, with files that are gone at once.

    Raises UserError if there is no configuration, or nothing can be written.
    """
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root.absolute() / '.dvc'} does not exist; run from the root of the repository")
    try:
        settings = Config(str(root / ".dvc"))["cache"]
    except ConfigError as error:
        raise UserError(f".dvc/config cannot be read ({error}); mend it, see dvc config --list") from error
    cache = Path(settings.get("dir") or root / CACHE)
    try:
        with _trial_folder(nearest(cache)) as source, _trial_folder(root) as target:
            # The function puts its file beside the second path.
            works = generic.test_links(list(LINKS), localfs, source, localfs, os.path.join(target, "beside"))
    except OSError as error:
        raise UserError(
            f"{error.filename or cache} cannot be written ({error.strerror}); make it writable for this user"
        ) from error
    return Links(cache, tuple(settings.get("type") or DEFAULT_LINKS), tuple(works))


def _trial_folder(parent: Path) -> tempfile.TemporaryDirectory:
    # A name that Git and DVC ignore.
    return tempfile.TemporaryDirectory(prefix=".check_", suffix=".tmp", dir=parent)


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def device(path: Path) -> int:
    """The file system that holds the path, or will."""
    return nearest(path).stat().st_dev


def disk_demands(workload: Workload, links: Links, root: Path) -> list[Demand]:
    """What a run adds to workspace, cache and scratch, less what the outs there hold already.

    Outs that are linked lie in the cache alone; if that is another file system, the workspace still holds each while it
    is written.
    """
    missing = {
        stage: max(0.0, need.written - (_size(root / OUTS[stage]) if stage in OUTS else 0))
        for stage, need in workload.needs().items()
    }
    total = sum(missing.values())
    if links.used == "copy":
        in_workspace = total
    else:
        in_workspace = 0.0 if device(links.cache) == device(root) else max(missing.values())
    scratch = root / SCRATCH
    return [
        *_download_demands(workload),
        Demand("workspace", root, in_workspace),
        Demand("DVC cache", links.cache, total),
        Demand("checkpoints", scratch, max(0.0, workload.scratch_bytes - _size(scratch))),
    ]


def _download_demands(workload: Workload) -> list[Demand]:
    """What the hub's client will put into its cache, where the text comes from the hub."""
    if not workload.download_bytes:
        return []
    folder = Path(HF_HUB_CACHE, repo_folder_name(repo_id=workload.plan.prepare.dataset, repo_type="dataset"))
    return [Demand("hub cache", folder, max(0.0, workload.download_bytes - _size(folder)))]


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; a run in progress may remove some meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total
