"""The frame of every command-line tool: how options are spelled and how errors end a process."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpt2.pipeline.files import UserError

# As shells report a process that SIGINT ended.
INTERRUPTED = 130


@contextmanager
def reporting(name: str) -> Iterator[None]:
    """End the process without a traceback on a UserError (`name: message`, status 1) and on Ctrl-C (status 130)."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise SystemExit(INTERRUPTED) from None


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts --max-tokens for --max_tokens, and the reverse."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        long = [name for name in names if name.startswith("--")]
        spelled = [f"--{name[2:].replace(old, new)}" for name in long for old, new in ("_-", "-_")]
        return super().add_argument(*dict.fromkeys([*names, *spelled]), **options)
