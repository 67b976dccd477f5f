"""Heartbeat file in the scratch folder of a run: its progress, for `python -m gpt2.status`."""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

FILE = "heartbeat.json"
# Least seconds between two writes of the file.
INTERVAL = 1.0


class Heartbeat:
    """Writes the progress of a run; only the main process has one."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._last = -INTERVAL
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}

    @property
    def due(self) -> bool:
        """Whether INTERVAL has passed."""
        return time.monotonic() - self._last >= INTERVAL

    def beat(self, values: Mapping) -> None:
        """Replace the content of the file by `values` and the identity of this process."""
        self._last = time.monotonic()
        temporary = self._path.with_name(f".{FILE}.tmp")
        temporary.write_text(json.dumps({**self._own, "time": time.time(), **values}), encoding="utf-8")
        # Atomic, but not synced: nothing depends on it after a crash.
        temporary.replace(self._path)


def read_heartbeats(scratch: Path) -> list[tuple[Path, dict]]:
    """Folder and last heartbeat of every run under `scratch`, the latest first; damaged files are skipped."""
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
