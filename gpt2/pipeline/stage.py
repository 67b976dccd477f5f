"""The frame of a pipeline stage: parameters in, guarded and timed results out.

DVC hashes a stage's dependencies when the stage ends. A source file or parameter edited while it ran would be recorded
as the origin of a result that it did not produce. In that case the frame fails the stage.
"""

import hashlib
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gpt2.pipeline import params
from gpt2.pipeline.command import reporting
from gpt2.pipeline.files import UserError, write_json
from gpt2.pipeline.interrupt import end_with_launcher
from gpt2.pipeline.params import C

SPEED = Path("metrics/speed")
# Decides no result, so a long run may go on after an edit of it.
UNGUARDED = "hardware"
V = TypeVar("V")
log = logging.getLogger(__name__)


class Stage:
    """Context manager around the body of a stage.

    Inside, `load` reads parameters and `timed` collects measured figures. After a block without an error, sources and
    parameters are compared with those at the start, and `metrics/speed/<name>.json` is written. A UserError ends the
    process with its message and no traceback.
    """

    def __init__(self, name: str):
        self.name = name
        self._silent = False
        self.timed: dict[str, float] = {}
        self._read: list[tuple[str, Callable[[], object], object]] = []

    def silence(self) -> None:
        """Log warnings only and write nothing: for all processes of a stage but one."""
        self._silent = True
        logging.getLogger().setLevel(logging.WARNING)

    def load(self, section: str, cls: type[C], **known) -> C:
        """Load a section of the active scale; see `params.load`."""
        if section == UNGUARDED:
            return params.load(section, cls, **known)
        return self._remember(section, lambda: params.load(section, cls, **known))

    def top(self, key: str) -> Any:
        """The value of a key at the top of params.yaml, such as `norm`."""
        return self._remember(key, lambda: params.top(key))

    def _remember(self, key: str, read: Callable[[], V]) -> V:
        value = read()
        self._read.append((key, read, value))
        return value

    def __enter__(self) -> "Stage":
        logging.basicConfig(
            level=logging.INFO,
            format=f"%(asctime)s {self.name}: %(message)s",
            datefmt="%H:%M:%S",
            stream=sys.stderr,
        )
        end_with_launcher()
        self._started = time.perf_counter()
        self._sources = _source_hashes()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, UserError | KeyboardInterrupt):
            with reporting(self.name):
                raise error
        if error is not None or self._silent:
            return
        self._refuse_if_edited()
        seconds = time.perf_counter() - self._started
        figures = {"seconds": round(seconds, 3), "peak_memory_gib": round(peak_memory_gib(), 3), **self.timed}
        write_json(SPEED / f"{self.name.replace('-', '_')}.json", figures)
        log.info("done in %.1f s", seconds)

    def _refuse_if_edited(self) -> None:
        now = _source_hashes()
        edited = [path for path, digest in self._sources.items() if now.get(path) != digest]
        edited += [f"{params.PARAMS_FILE} ({key})" for key, read, value in self._read if read() != value]
        if edited:
            raise SystemExit(
                f"{self.name}: edited while the stage ran: {', '.join(edited)}; "
                "its result would be recorded under the wrong sources and is dropped; run dvc repro again"
            )


def peak_memory_gib() -> float:
    """Largest resident set of this process and of its largest ended child so far, in GiB."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _source_hashes() -> dict[str, str]:
    """Digest of every imported module of this repository and of the templates next to it, by relative path."""
    root = Path(__file__).resolve().parents[2]
    guarded = (root / "gpt2", root / "stages")
    hashes = {}
    for module in list(sys.modules.values()):
        source = Path(getattr(module, "__file__", None) or "")
        if source.suffix == ".py" and any(source.is_relative_to(folder) for folder in guarded):
            for path in (source, *source.parent.glob("*.j2")):
                hashes[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
