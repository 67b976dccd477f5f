"""Files of a dataset repository of the Hugging Face hub, whole and checked, in the client's own cache.

The client (huggingface_hub) resolves revisions, lists, authenticates and keeps the cache, so HF_TOKEN, HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE hold. Three things are added to it. A download that was broken off, by whatever, goes on
where it ended: the client begins a file anew in a new process. Every file is compared with its hash, also one that was
in the cache before. And where the client gives up after half a minute, we ask again for a quarter of an hour.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TypeVar

from gpt2.pipeline.files import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds before another try, after those of the client. A download that gets on at all is tried without end.
WAITS = (10, 30, 100, 300, 300)
# A file that has another hash is fetched once more.
FETCHES = 2
# The hub is asked for at most so many files at once.
MOST_AHEAD = 3
LOG_SECONDS = 30
CHUNK = 2**20
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFiles:
    """The files of one commit whose names match a pattern, in order of their names."""

    dataset: str
    commit: str
    # The client's folder of this commit, with a link to each file that is there.
    folder: Path
    names: Sequence[str]
    n_bytes: int

    def fetch(self, ahead: int = 0) -> Iterator[tuple[str, Path]]:
        """Yield name and path of each file as soon as it is whole, while up to `ahead` more are fetched.

        Raises UserError if one cannot be had or has another hash than the hub says.
        """
        stop = Event()
        pool = ThreadPoolExecutor(1 + ahead)
        try:
            waiting = deque()
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
        from huggingface_hub import hf_hub_download, hf_hub_url
        from huggingface_hub.file_download import get_hf_file_metadata

        path = self.folder / name
        # The cache names a file by its hash and links to it.
        if path.exists() and _digest(path, path.resolve().name) == path.resolve().name:
            return path
        if _is_offline():
            state = "damaged in" if path.exists() else "not in"
            raise UserError(
                f"{self.dataset}: {name} is {state} the cache {self.folder}, and HF_HUB_OFFLINE is set; unset it"
            )
        if path.exists():
            log.warning("%s: %s is damaged in the cache, fetching it again", self.dataset, name)
            path.resolve().unlink()
            path.unlink()
        with _named(f"{self.dataset}: {name}"):
            url = hf_hub_url(self.dataset, name, repo_type="dataset", revision=self.commit)
            known = _patiently(lambda: get_hf_file_metadata(url, retry_on_errors=True), name, stop)
            blob = self.folder.parent.parent / "blobs" / known.etag
            _download(url, name, blob, known.size, stop)
            # Finds the file there and links it.
            repository = {"repo_id": self.dataset, "repo_type": "dataset", "revision": self.commit}
            return Path(_patiently(lambda: hf_hub_download(**repository, filename=name), name, stop))


def open_dataset(dataset: str, revision: str, pattern: str) -> HubFiles:
    """The files of a dataset that match `pattern` (* also matches /) at a revision; nothing is downloaded yet.

    A branch or tag is resolved to its commit here, once. Without a connection (HF_HUB_OFFLINE) the cache must hold the
    list of files of that commit. Raises UserError naming what is not there.
    """
    # Imported here: only this source needs the client.
    from huggingface_hub import HfApi, get_cached_repo_tree, resolve_revision, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    # It would log every request, with the signatures in it, and warn that no file of the pattern [] was found.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
    place = f"{dataset} at revision {revision}"
    with _named(place):
        if COMMIT.fullmatch(revision):
            commit = revision
        elif _is_offline():
            commit = resolve_revision(dataset, repo_type="dataset", revision=revision, local_files_only=True).resolved
        else:
            commit = _patiently(lambda: HfApi().dataset_info(dataset, revision=revision).sha, place)
        repository = {"repo_id": dataset, "repo_type": "dataset", "revision": commit}
        # Fetches no file, but puts the list of them into the cache.
        folder = _patiently(lambda: snapshot_download(**repository, allow_patterns=[]), place)
        files = sorted((file.path, file.size) for file in get_cached_repo_tree(**repository))
    chosen = [(name, size) for name, size in files if fnmatchcase(name, pattern)]
    if not chosen:
        some = ", ".join(name for name, _ in files[:5])
        raise UserError(f"{place} holds no file {pattern}; it has {len(files)} files, such as {some}: name those meant")
    return HubFiles(dataset, commit, Path(folder), [name for name, _ in chosen], sum(size for _, size in chosen))


def _download(url: str, name: str, blob: Path, size: int, stop: Event) -> None:
    """Bring `url` to `blob`, named by its hash, through a file beside it that outlives this process."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.partial")
    # Without a buffer: what has come is on the disk, also if this process is killed.
    with open(partial, "ab", buffering=0) as out:
        # Another run may be at it.
        fcntl.flock(out, fcntl.LOCK_EX)
        if blob.exists():
            return
        for _ in range(FETCHES):
            while out.seek(0, os.SEEK_END) < size:
                _patiently(lambda: _continue(url, name, out, size, stop), name, stop)
            if (found := _digest(partial, blob.name)) == blob.name:
                os.fsync(out.fileno())
                os.replace(partial, blob)
                return
            log.warning("%s has the hash %s, the hub says %s", name, found, blob.name)
            out.truncate(0)
        partial.unlink()
    raise UserError(
        f"{name}: the bytes that came have the hash {found}, not {blob.name} as the hub says; check the network and "
        "HF_ENDPOINT, and run again"
    )


def _continue(url: str, name: str, out: FileIO, size: int, stop: Event) -> None:
    """Append to the open file `out` what a request for the rest of `url` brings, which may be less."""
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    start = logged = time.monotonic()
    begin = position = out.tell()
    headers = build_hf_headers() | {"Range": f"bytes={begin}-", "Accept-Encoding": "identity"}
    # The client waits as Retry-After says, or longer each time.
    request = http_stream_backoff(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
    )
    try:
        with request as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                out.truncate(0)
                position = 0
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise InterruptedError(f"{name} is not needed any more")
                rest = memoryview(chunk)
                while rest:
                    rest = rest[out.write(rest) :]
                position += len(chunk)
                if (now := time.monotonic()) - logged > LOG_SECONDS:
                    logged = now
                    rate = max(1, position - begin) / (now - start)
                    text = "%s: %.2f of %.2f GB, %.1f MB/s, %.0f min left"
                    log.info(text, name, position / 1e9, size / 1e9, rate / 1e6, (size - position) / rate / 60)
    except TransportError as error:
        if position <= begin:
            raise
        log.warning("%s: broken off at %d of %d bytes (%s), going on from there", name, position, size, error)
    except HfHubHTTPError as error:
        if error.response.status_code == 416:
            # There is no rest: what is here cannot be right.
            out.truncate(0)
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{out.name} cannot be written ({error.strerror}): {size - position:,} bytes are missing; make room or set "
            "HF_HOME to another disk, and run again: it goes on from what is there"
        ) from error
    if position <= begin:
        raise UserError(f"{name}: the hub sent nothing after byte {begin} of {size}; run again later")


def _digest(path: Path, like: str) -> str:
    """The hash of a file: SHA-256 where `like` is one, else that of Git, as the hub has for small files."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _patiently(ask: Callable[[], T], what: str, stop: Event | None = None) -> T:
    """What `ask` returns; it is asked again, later each time, while the network or the hub has trouble."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    waits = iter(WAITS)
    while True:
        try:
            return ask()
        except (TransportError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            # The client's LocalEntryNotFoundError stands for any trouble.
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
            passing = not _is_offline() and (status in (408, 429) or status >= 500)
            if not passing or (wait := next(waits, None)) is None:
                raise
            log.warning("%s: %s; trying again in %d s", what, _one_line(error), wait)
            if (stop or Event()).wait(wait):
                raise InterruptedError(f"{what} is not needed any more") from error


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn what the client raises into a UserError that says where and what to do."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        yield
    except (UserError, InterruptedError):
        raise
    except (
        *(HTTPError, OSError, ValueError, EntryNotFoundError),
        *(CachedRepoTreeNotFoundError, RevisionResolutionError),
    ) as error:
        if _is_offline():
            remedy = "unset HF_HUB_OFFLINE, or run where the cache (HF_HOME) holds that commit"
        elif isinstance(error, RepositoryNotFoundError):
            remedy = "mend the name, or set HF_TOKEN if it is private or gated"
        elif isinstance(error, RevisionNotFoundError):
            remedy = "mend the revision"
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            remedy = "the hub lists this file but does not have it: take another revision"
        else:
            remedy = "check the network and HF_ENDPOINT, and run again: finished files and parts of files are kept"
        raise UserError(f"{place} cannot be had from the hub ({_one_line(error)}); {remedy}") from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
