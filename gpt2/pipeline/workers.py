"""Work spread over processes: results in the order of the tasks, bounded memory, and no process left behind."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

from gpt2.pipeline.files import UserError

T = TypeVar("T")
R = TypeVar("R")
# Tasks per worker that may be started or finished while an earlier one is not.
AHEAD = 4


def in_order(
    function: Callable[[T], R], tasks: Iterable[T], workers: int, initializer: Callable[[], object] | None = None
) -> Generator[R, None, None]:
    """Yield `function(task)` for each task, computed by `workers` processes, or by this one if `workers` is 1.

    Function, tasks and `initializer`, which each worker process calls once, are pickled. At most AHEAD tasks a worker
    are started beyond the result that is yielded next. An exception of the function is raised here. Raises UserError if
    a worker is killed. Close the generator to stop early: then, and at its end, no process is left. If this process is
    killed, the workers end at once.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = get_context("spawn")
    # Only this process holds `alive`. When it closes, here or by the death of this process, the workers see it and end.
    watched, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (watched, initializer))
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(function, task)))
            if len(pending) == AHEAD * workers:
                yield pending.popleft()[1].result()
        while pending:
            yield pending.popleft()[1].result()
        pool.shutdown()
    except BrokenProcessPool:
        waiting = f" at {pending[0][0]} or before" if pending else ""
        raise UserError(
            f"a worker process was killed{waiting}; if memory ran out, lower hardware.workers; run dvc repro again"
        ) from None
    finally:
        alive.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _begin(watched: Connection, initializer: Callable[[], object] | None) -> None:
    """Prepare a worker."""
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    # A terminal or a job scheduler sends these to every process; the parent decides what follows.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if initializer:
        initializer()


def _end_with(watched: Connection) -> None:
    """End this process as soon as the other end of the pipe is closed, whatever it is doing."""
    watched.poll(None)
    os._exit(1)
