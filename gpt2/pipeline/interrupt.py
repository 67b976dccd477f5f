"""Requests to stop a long run: SIGTERM, SIGINT, or the death of a process that started this one.

Neither DVC nor torchrun passes its death on, and an orphan would hold the machine and the resume state.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

# Set by torchrun in the processes that it starts, and by DVC.
TORCHRUN_MARK = "TORCHELASTIC_RUN_ID"
MARKS = ("DVC_STAGE", TORCHRUN_MARK)
# PID of torchrun, set where this project starts it: a process that was orphaned before its first look finds it here.
LAUNCHER = "GPT2_LAUNCHER_PID"
# Seconds between two looks at the launchers, and from the death of one to the end of this process.
POLL_SECONDS, GRACE_SECONDS = 0.25, 3.5
WATCH = "end-with-launcher"


class Interrupt:
    """Context manager that records requests to stop, SIGTERM and SIGINT included, instead of ending the process."""

    def __enter__(self) -> "Interrupt":
        self._received: list[int] = []
        self._ancestry = launched_by()
        self._handlers = {
            number: signal.signal(number, lambda signum, _: self._received.append(signum))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether to stop as soon as the state is saved."""
        return bool(self._received) or not all(_is_child(child, parent) for child, parent in self._ancestry)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it; that of SIGTERM if the request was no signal."""
        return 128 + max(self._received, default=signal.SIGTERM)


def launched_by() -> list[tuple[int, int]]:
    """Return PIDs (process, parent) from this process up to DVC, or up to torchrun without DVC; empty without both."""
    pairs, process = [], psutil.Process()
    try:
        if TORCHRUN_MARK in os.environ and LAUNCHER in os.environ:
            pairs.append((process.pid, int(os.environ[LAUNCHER])))
            process = psutil.Process(pairs[0][1])
        while any(mark in process.environ() for mark in MARKS) and process.ppid():
            pairs.append((process.pid, process.ppid()))
            process = psutil.Process(process.ppid())
    except psutil.Error:
        pass  # The environment of other users' processes and of containers cannot be read.
    return pairs


def end_with_launcher() -> None:
    """Start a thread that ends this process GRACE_SECONDS after the death of DVC or torchrun, even if it hangs.

    Until then `Interrupt` may save the state. A torchrun that outlives DVC is killed, because it would restart them.
    """
    ancestry = launched_by()
    if ancestry and all(thread.name != WATCH for thread in threading.enumerate()):
        threading.Thread(target=_end_after, args=(ancestry,), name=WATCH, daemon=True).start()


def _end_after(ancestry: list[tuple[int, int]]) -> None:
    while all(_is_child(child, parent) for child, parent in ancestry):
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    child, parent = ancestry[0]
    if TORCHRUN_MARK in os.environ and _is_child(child, parent):
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def ending_torchrun() -> Iterator[None]:
    """End torchrun too if the block exits deliberately, by SystemExit: it restarts its processes after any exit."""
    parent = os.getppid()
    try:
        yield
    except SystemExit as deliberate:
        if TORCHRUN_MARK not in os.environ or os.getppid() != parent:
            raise
        if isinstance(deliberate.code, str):
            # Printed before SIGTERM to torchrun, which ends this process in turn.
            print(deliberate.code, file=sys.stderr, flush=True)
        os.kill(parent, signal.SIGTERM)
        raise SystemExit(deliberate.code if isinstance(deliberate.code, int) else 1) from None


def _is_child(child: int, parent: int) -> bool:
    try:
        return psutil.Process(child).ppid() == parent
    except psutil.NoSuchProcess:
        return False
