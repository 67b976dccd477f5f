"""Files of a data set of the Hugging Face hub, through the hub's own client and its cache.

huggingface_hub resolves revisions, lists, downloads, authenticates and keeps the cache, so HF_TOKEN, HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE hold. `datasets` finds the files of a config and a split. Added here: the client gives up
after seconds, we retry for a quarter of an hour; files are fetched ahead of the reader; progress goes to the log.
"""

import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import errors, utils
from tqdm import tqdm

from gpt2.pipeline.files import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
CARD = "README.md"
# Seconds before each retry, after the retries of the client.
WAITS = (10, 30, 100, 300, 300)
LOG_SECONDS = 30
# What the client (RuntimeError: its downloader hf_xet) and `datasets` (ValueError) raise.
TROUBLE = (
    *(HTTPError, OSError, RuntimeError, ValueError),
    *(errors.RevisionResolutionError, errors.CachedRepoTreeNotFoundError),
)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit of a data set, in order of their names; `n_bytes` is their total size."""

    dataset: str
    commit: str
    names: Sequence[str]
    n_bytes: int

    def fetch(self, ahead: int = 0) -> Iterator[tuple[str, Path]]:
        """Yield name and path of each file while up to `ahead` more are downloaded; those in the cache are not.

        Raises UserError if a file cannot be downloaded.
        """
        stop = Event()
        pool = ThreadPoolExecutor(1 + ahead)
        try:
            waiting: deque[tuple[str, Future[Path]]] = deque()
            for name in self.names:
                waiting.append((name, pool.submit(self._fetch, name, stop)))
                if len(waiting) > ahead:
                    name, path = waiting.popleft()
                    yield name, path.result()
            for name, path in waiting:
                yield name, path.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _fetch(self, name: str, stop: Event) -> Path:
        bar: Any = partial(_LoggedBar, stop)
        download = partial(huggingface_hub.hf_hub_download, repo_type="dataset", revision=self.commit, tqdm_class=bar)
        return Path(_ask(lambda: download(self.dataset, name), f"{self.dataset}: {name}", stop))


class _LoggedBar(tqdm):
    """The client's progress bar as lines of the log. Raises CancelledError, which ends the download, after `stop`."""

    def __init__(self, stop: Event, **options: Any):
        self._stop = stop
        super().__init__(**{**options, "mininterval": LOG_SECONDS, "bar_format": None, "file": StringIO()})

    def update(self, n: float | None = 1) -> bool | None:
        if self._stop.is_set():
            raise CancelledError
        return super().update(n)

    def display(self, *_: Any, **__: Any) -> None:
        log.info(str(self))


def open_dataset(
    dataset: str,
    revision: str,
    pattern: str | None = None,
    config: str | None = None,
    split: str = "train",
    endings: Sequence[str] = (),
) -> HubFiles:
    """The files of a data set at a revision that match `pattern` (* also matches /), or else those of config and split.

    Of config and split, only names with one of `endings` count; config None is the default one. Only the data set card
    is downloaded here. A branch or tag is resolved to its commit once. With HF_HUB_OFFLINE the cache must hold
    revision, list of files and card. Raises UserError naming what is missing.
    """
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    # It logs every request, with the signatures in its address.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    place = f"{dataset} at revision {revision}"
    resolve = partial(huggingface_hub.resolve_revision, dataset, repo_type="dataset", revision=revision)
    commit = _ask(resolve, place).resolved
    sizes, card = _ask(lambda: _list_files(dataset, commit, pattern is None), place)
    if pattern is not None:
        names = [name for name in sizes if fnmatchcase(name, pattern)]
    else:
        readable = [name for name in sizes if name.endswith(tuple(endings))]
        splits = _ask(lambda: _split_files(readable, card, config, endings), f"{place}, config {config}")
        if (names := splits.get(split, [])) == []:
            raise UserError(f"{place} has no split {split}, but {', '.join(splits)}; name one of these")
    if not names:
        some = ", ".join(list(sizes)[:5])
        raise UserError(f"{place} holds no file {pattern}; it has {len(sizes)} files, such as {some}: name those meant")
    return HubFiles(dataset, commit, sorted(names), sum(sizes[name] for name in names))


def _list_files(dataset: str, commit: str, with_card: bool) -> tuple[dict[str, int], str]:
    """Sizes of all files by name, in order of the names, and the text of the data set card, "" if there is none."""
    # This call also puts the list of all files into the cache.
    wanted = [CARD] if with_card else []
    folder = huggingface_hub.snapshot_download(dataset, repo_type="dataset", revision=commit, allow_patterns=wanted)
    files = huggingface_hub.get_cached_repo_tree(dataset, repo_type="dataset", revision=commit)
    card = Path(folder, CARD)
    return dict(sorted((file.path, file.size) for file in files)), card.read_text("utf-8") if card.is_file() else ""


def _split_files(names: Sequence[str], card: str, config: str | None, endings: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split of a config, which `datasets` finds from the card and the names alone.

    It gets a folder of empty files with these names: it would list the hub again, and not at all without a network.
    """
    from datasets import load_dataset_builder  # imported here since it takes seconds

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "files"
        folder.mkdir()
        (folder / CARD).write_text(card, "utf-8")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        try:
            splits = load_dataset_builder(str(folder), config, cache_dir=temporary).config.data_files
        except FileNotFoundError as error:
            raise ValueError(f"no file *{', *'.join(endings)} is found: {error}") from error
        return {str(split): [Path(file).relative_to(folder).as_posix() for file in splits[split]] for split in splits}


def _ask(ask: Callable[[], T], place: str, stop: Event | None = None) -> T:
    """Return what `ask` returns; retry, later each time, while the network or the hub is in trouble.

    Raises UserError that says where and what to do, and CancelledError if `stop` is set while it waits.
    """
    waits = iter(WAITS)
    while True:
        try:
            return ask()
        except TROUBLE as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            if not _may_pass(error) or (wait := next(waits, None)) is None:
                raise UserError(f"{place} cannot be read from the hub ({reason}); {_remedy(error)}") from error
            log.warning("%s: %s; trying again in %d s", place, reason, wait)
        if (stop or Event()).wait(wait):
            raise CancelledError


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not (_is_local(error) or isinstance(error, ValueError) or huggingface_hub.is_offline_mode())


def _is_local(error: Exception) -> bool:
    """Whether the error comes from this machine, such as a full disk: the client's own errors have no number."""
    return isinstance(error, OSError) and error.errno is not None


def _remedy(error: Exception) -> str:
    if _is_local(error):
        return "make room, or set HF_HOME to a disk that can be written"
    if _may_pass(error):
        return "check the network and HF_ENDPOINT, and run again: finished files are kept"
    if huggingface_hub.is_offline_mode() and not isinstance(error, ValueError):
        return "unset HF_HUB_OFFLINE, or run where the cache (HF_HOME) holds that commit"
    return "correct the data set's name, revision, config or files; set HF_TOKEN if it is private or gated"
