"""A small file beside the resume state that says how far a run is, for `python -m gpt2.status`."""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

FILE = "heartbeat.json"
# At most so often, in seconds, is the file rewritten.
INTERVAL = 1.0


class Heartbeat:
    """Writes the state of this process's run; rank 0 has one."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._last = -INTERVAL
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}

    @property
    def due(self) -> bool:
        """Whether INTERVAL has passed."""
        return time.monotonic() - self._last >= INTERVAL

    def beat(self, values: Mapping) -> None:
        """Replace the file by `values`."""
        self._last = time.monotonic()
        temporary = self._path.with_name(f".{FILE}.tmp")
        temporary.write_text(json.dumps({**self._own, "time": time.time(), **values}), encoding="utf-8")
        # Whole or absent, but not synced: nothing depends on it after a crash.
        temporary.replace(self._path)


def read_heartbeats(scratch: Path) -> list[tuple[Path, dict]]:
    """Folder and last heartbeat of every run under `scratch`, the latest first; damaged files are left out."""
    found = []
    for path in scratch.glob(f"*/*/{FILE}"):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda pair: pair[1]["time"], reverse=True)


def is_alive(beat: Mapping) -> bool | None:
    """Whether the process that wrote `beat` still runs; None if it ran on another machine."""
    if beat["host"] != socket.gethostname():
        return None
    try:
        return abs(psutil.Process(beat["pid"]).create_time() - beat["started"]) < 1
    except psutil.NoSuchProcess:
        return False
