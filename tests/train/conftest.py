"""Fixtures of the tests of training."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training_run import train_here


@pytest.fixture
def resume(monkeypatch, caplog) -> Callable[[Path], int]:
    """A function that runs the stage of a folder in this process; it returns the step after which the run resumed,
    0 if it started from the beginning."""

    def run(folder: Path) -> int:
        caplog.clear()
        with caplog.at_level("INFO"):
            train_here(folder, monkeypatch)
        return resumed_step(caplog.text)

    return run


def resumed_step(log: str) -> int:
    """The step after which the run of a log resumed, 0 if it started from the beginning."""
    found = re.search(r"resuming after step (\d+)", log)
    return int(found[1]) if found else 0
