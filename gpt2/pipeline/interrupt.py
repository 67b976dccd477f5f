"""Requests to stop a long run: SIGTERM, SIGINT, or the death of a process that started this one.

Neither DVC nor torchrun passes its death on, and an orphan would hold the machine and the resume state.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

# Set by DVC and by torchrun in the processes that they start.
MARKS = ("DVC_STAGE", "TORCHELASTIC_RUN_ID")


class Interrupt:
    """Context manager that collects requests to stop instead of dying of them."""

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
        """128 and the signal's number, as shells have it; SIGTERM stands for a request that came by another way."""
        return 128 + max(self._received, default=signal.SIGTERM)


def launched_by() -> list[tuple[int, int]]:
    """Pairs of process and parent from this process up to DVC, or to torchrun where no DVC is; none without both."""
    pairs, process = [], psutil.Process()
    try:
        while any(mark in process.environ() for mark in MARKS) and process.ppid():
            pairs.append((process.pid, process.ppid()))
            process = psutil.Process(process.ppid())
    except psutil.Error:
        pass  # Processes of other users and of containers keep their environment to themselves.
    return pairs


@contextmanager
def ending_torchrun() -> Iterator[None]:
    """End torchrun too if the block exits deliberately, by SystemExit: it restarts its processes after any exit."""
    parent = os.getppid()
    try:
        yield
    except SystemExit as deliberate:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != parent:
            raise
        if isinstance(deliberate.code, str):
            # Now, since torchrun ends this process in turn.
            print(deliberate.code, file=sys.stderr, flush=True)
        os.kill(parent, signal.SIGTERM)
        raise SystemExit(deliberate.code if isinstance(deliberate.code, int) else 1) from None


def _is_child(child: int, parent: int) -> bool:
    try:
        return psutil.Process(child).ppid() == parent
    except psutil.NoSuchProcess:
        return False
