"""The code of others that benchmarks run beside ours."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_nanogpt(checkout: Path) -> ModuleType:
    """model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt
    spec.loader.exec_module(nanogpt)
    return nanogpt
