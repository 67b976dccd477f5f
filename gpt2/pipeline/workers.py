"""Work spread over processes: results in the order of the tasks, bounded memory, and no process left behind.

Each process has a socket of its own, whose other end only the parent holds. So a worker sees the end of it when the
parent dies, however that happens, and the parent sees the end of a worker that the system kills. They are interpreters
of their own and import what the function needs, not what the parent's main module does, as multiprocessing would.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from gpt2.pipeline.files import UserError

T = TypeVar("T")
R = TypeVar("R")
# Tasks of one worker, the one at work included: the next is there before it asks.
QUEUED = 2
# Tasks of each worker that may be begun or done while an earlier one is not.
AHEAD = 4
# For a worker whose socket has closed to be gone as well.
END_SECONDS = 10
_SERVE = "import sys; from gpt2.pipeline.workers import serve; serve(int(sys.argv[1]))"


def in_order(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield `function(task)` for each task, computed by `workers` processes, or by this one if it is 1.

    Function and tasks are pickled, so the function's module must be one that can be imported. At most AHEAD tasks a
    worker are begun beyond the result that is yielded next. An exception of the function is raised here as soon as it
    is known; a killed worker is a UserError that names it and its task. Close the generator to stop early: then, and at
    its end, no process is left.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    crew: list[_Worker] = []
    try:
        for number in range(1, workers + 1):
            crew.append(_Worker(number))
        # Only now that all are starting: the first to be sent something big is waited for.
        for worker in crew:
            worker.send(function)
        yield from _spread(iter(tasks), crew)
    finally:
        for worker in crew:
            worker.stop()


def _spread(tasks: Iterator[Any], crew: list["_Worker"]) -> Iterator[Any]:
    done: dict[int, Any] = {}
    numbered = enumerate(tasks)
    given = 0
    for wanted in count():
        while True:
            while given < wanted + AHEAD * len(crew):
                worker = min(crew, key=lambda worker: len(worker.tasks))
                if len(worker.tasks) == QUEUED or (task := next(numbered, None)) is None:
                    break
                worker.give(*task)
                given += 1
            if wanted in done:
                break
            if not (busy := {worker.connection: worker for worker in crew if worker.tasks}):
                return
            for ready in wait(list(busy)):
                number, result = busy[ready].take()  # type: ignore[index]  # one of those that were waited for
                done[number] = result
        yield done.pop(wanted)


class _Worker:
    """A process, and the tasks that it has not answered."""

    def __init__(self, number: int):
        self._name = f"worker {number}"
        self.tasks: deque[tuple[int, Any]] = deque()
        ours, theirs = socket.socketpair()
        # No copy of this process: its threads may hold locks, which a fork would find held for ever.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        # With the last end of theirs the worker goes, so this process must have none.
        theirs.close()
        self.connection = Connection(ours.detach())

    def send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise self._lost() from None

    def give(self, number: int, task: object) -> None:
        self.tasks.append((number, task))
        self.send(task)

    def take(self) -> tuple[int, Any]:
        """Number and result of its oldest task; raises what the task raised."""
        try:
            result, error = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if error is not None:
            raise error
        return self.tasks.popleft()[0], result

    def _lost(self) -> UserError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
        at = f" at {self.tasks[0][1]}" if self.tasks else ""
        memory = "; if memory ran out, lower hardware.workers" if code == -signal.SIGKILL else ""
        return UserError(f"{self._name} (process {self._process.pid}) {how}{at}{memory}; run dvc repro again")

    def stop(self) -> None:
        self.connection.close()
        # Discard unfinished work.
        self._process.kill()
        self._process.wait()


def serve(descriptor: int) -> None:
    """The life of a worker: take the function, then answer tasks until the parent's end of the socket closes."""
    connection = Connection(descriptor)
    # These may reach every process of a terminal or a job; the parent decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        function = connection.recv()
        while True:
            connection.send(_answer(function, connection.recv()))
    except (EOFError, OSError):
        return


def _answer(function: Callable, task: object) -> tuple[Any, Exception | None]:
    try:
        return function(task), None
    except UserError as error:
        return None, error
    except Exception:
        # As text, since not every exception can be pickled, and a traceback never.
        return None, RuntimeError(f"in a worker, at {task}:\n{traceback.format_exc()}")
