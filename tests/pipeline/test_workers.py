"""Work over processes comes back in order, whoever is slow, and ends with whoever dies."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import resource_tracker

import psutil
import pytest

from gpt2.pipeline.files import UserError
from gpt2.pipeline.workers import AHEAD, in_order
from tests.closure import ROOT


def double_late(number: int) -> int:
    """Earlier tasks take longer."""
    time.sleep(0.02 * (5 - number % 5))
    return 2 * number


def stall_at_first(number: int) -> int:
    time.sleep(1.0 * (number == 0))
    return number


def refuse_three(number: int) -> int:
    if number == 3:
        raise UserError("three is not allowed; take four")
    return number


def divide_by_zero(number: int) -> float:
    return 1 / number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


MARKS: list[int] = []


def leave_mark() -> None:
    MARKS.append(1)


def read_mark(_: int) -> int:
    return len(MARKS)


def sleep_for(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def process_number(_: int) -> int:
    return os.getpid()


# What other tests started, and the process that multiprocessing keeps to track resources, is not ours.
OTHERS: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def know_others() -> None:
    resource_tracker.ensure_running()
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process not in OTHERS]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_results_come_in_the_order_of_the_tasks(workers, n):
    assert list(in_order(double_late, range(n), workers)) == [2 * i for i in range(n)]
    assert children() == []


def test_one_worker_is_this_process_and_two_are_others():
    assert set(in_order(process_number, range(5), 1)) == {os.getpid()}
    others = set(in_order(process_number, range(20), 2))
    assert os.getpid() not in others and len(others) <= 2


def test_tasks_are_taken_only_as_far_ahead_as_results_may_wait():
    taken = []
    results = in_order(stall_at_first, (taken.append(i) or i for i in range(1000)), 2)
    assert next(results) == 0
    assert len(taken) <= 2 * AHEAD
    results.close()
    assert children() == []


@pytest.mark.parametrize(("function", "error"), [(refuse_three, UserError), (divide_by_zero, ZeroDivisionError)])
def test_an_exception_comes_as_it_was_raised_with_its_traceback(function, error):
    with pytest.raises(error) as raised:
        list(in_order(function, range(10), 2))
    assert function.__name__ in str(raised.value.__cause__)
    assert children() == []


def test_a_worker_that_is_killed_ends_the_work():
    with pytest.raises(UserError, match=r"killed at \d or before.*hardware\.workers.*run dvc repro again"):
        list(in_order(die_at_three, range(50), 2))
    assert children() == []


def test_work_that_nobody_waits_for_is_broken_off():
    started = time.monotonic()
    with closing(in_order(sleep_for, [0, 600, 600], 2)) as results:
        assert next(results) == 0
        assert len(children()) == 2
    assert time.monotonic() - started < 60
    assert children() == []


def test_every_worker_is_prepared_once():
    seen = list(in_order(read_mark, range(20), 2, leave_mark))
    assert set(seen) == {1}
    assert not MARKS


def test_workers_die_with_their_parent():
    script = (
        "import time; from gpt2.pipeline.workers import in_order; from tests.pipeline.test_workers import double_late\n"
        "for result in in_order(double_late, range(10**9), 2):\n"
        "    print(result, flush=True); time.sleep(0.01)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 2
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(family, timeout=25)
        assert alive == []
