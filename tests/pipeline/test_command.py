"""All command-line tools spell options and end in the same way."""

import os
import signal
import subprocess
import sys

import pytest

from gpt2.__main__ import COMMANDS
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from tests.closure import ROOT


@pytest.mark.parametrize("given", [["--max_tokens", "3"], ["--max-tokens", "3"], ["--max-tokens=3"]])
def test_options_are_known_with_hyphens_and_with_underscores(given):
    parser = Parser()
    parser.add_argument("--max_tokens", type=int)
    assert parser.parse_args(given).max_tokens == 3


def test_values_keep_their_hyphens_and_underscores():
    parser = Parser()
    parser.add_argument("--top-k")
    parser.add_argument("rest", nargs="*")
    found = parser.parse_args(["--top_k=a-b_c", "x-y", "--", "--top_k"])
    assert (found.top_k, found.rest) == ("a-b_c", ["x-y", "--top_k"])


def test_a_fault_of_the_user_is_one_message_and_status_1():
    with pytest.raises(SystemExit) as stopped, reporting("tool"):
        raise UserError("key = 3 must be 4")
    assert stopped.value.code == "tool: key = 3 must be 4"


def test_an_interrupt_ends_with_status_130_and_no_traceback():
    script = (
        "import signal, os; from gpt2.pipeline.command import reporting\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with reporting('tool'): os.kill(os.getpid(), signal.SIGINT); signal.pause()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (128 + signal.SIGINT, "")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), reporting("tool"):
        raise KeyError("bug")


def test_the_commands_are_listed_without_torch():
    code = "import sys, runpy; runpy.run_module('gpt2', run_name='__main__'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, line in zip(COMMANDS, lines, strict=False):
        assert line.startswith(f"python -m gpt2.{name} ") and len(line.split(maxsplit=3)[3]) > 20 and len(line) <= 120
    files = {path.stem for path in (ROOT / "gpt2").glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in (ROOT / "gpt2").glob("*/__main__.py")}
    assert files | packages == set(COMMANDS)
