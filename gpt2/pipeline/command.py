"""The frame of every command-line tool: how options are spelled and how errors end a process."""

import argparse
import sys
from collections.abc import Iterator, Sequence
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

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        # After a bare -- nothing is an option.
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(self._declared, given[:end]), *given[end:]], namespace)

    def _declared(self, argument: str) -> str:
        """An option in the spelling in which it was added; any other argument as it is."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        spelled = {option.replace("-", "_"): option for option in self._option_string_actions}
        return spelled.get(name.replace("-", "_"), name) + equals + value
