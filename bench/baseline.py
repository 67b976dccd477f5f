"""The code of others that benchmarks compare ours with."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from gpt2.pipeline.command import Parser


def ask_for_nanogpt(program: str, description: str, argv: Sequence[str]) -> Path | None:
    """The value of --nanogpt on a command line, if given. Ends the program if it is no checkout."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose model.py is measured")
    nanogpt = parser.parse_args(argv).nanogpt
    if nanogpt and not (nanogpt / "model.py").is_file():
        raise SystemExit(f"bench: {nanogpt}/model.py does not exist; give --nanogpt a checkout of nanoGPT")
    return nanogpt


def import_nanogpt(checkout: Path) -> ModuleType:
    """model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec and spec.loader
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt
    spec.loader.exec_module(nanogpt)
    return nanogpt
