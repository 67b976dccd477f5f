"""The import closure of a module of this repository, read from the source."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gpt2", "stages")
# The root of `gpt2`, whose empty __init__ no stage depends on.
LIBRARY = Path("gpt2")


def module_path(name: str) -> Path | None:
    """File of a dotted module name, relative to the root; None if it is none of ours."""
    path = Path(*name.split(".")).with_suffix(".py")
    return path if name.split(".")[0] in PACKAGES and (ROOT / path).is_file() else None


def imported_names(path: Path) -> set[str]:
    """Dotted names that `path` imports, at the top or inside functions; for `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def direct_imports(path: Path) -> set[Path]:
    """Files of this repository that `path` imports."""
    return {file for name in imported_names(path) if (file := module_path(name))}


def imported_packages(files: Iterable[Path]) -> set[str]:
    """Top-level packages that any of the files imports, the standard library's and this repository's left out."""
    packages = {name.split(".")[0] for file in files for name in imported_names(file)}
    return packages - sys.stdlib_module_names - set(PACKAGES)


def import_closure(path: Path) -> set[Path]:
    """`path` and every file of this repository that it imports, directly or not."""
    closure, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file not in closure:
            closure.add(file)
            waiting += direct_imports(file)
    return closure


def library_files() -> set[Path]:
    """Every module of the library, relative to the root, without the empty package files."""
    return {path.relative_to(ROOT) for path in (ROOT / LIBRARY).rglob("*.py")} - {
        path.relative_to(ROOT) for path in (ROOT / LIBRARY).rglob("__init__.py")
    }
