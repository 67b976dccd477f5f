"""Documentation text of installed packages, read from their source files; nothing is imported or executed.

A document is a docstring of a module, class or function, or a text that a module attaches to compiled code with
`add_docstr` or `add_newdoc`. Its id is the qualified name of what it documents.
"""

import ast
import gc
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib import metadata
from itertools import chain
from pathlib import Path
from string import Formatter

from gpt2.pipeline.files import UserError
from gpt2.pipeline.workers import in_order
from gpt2.prepare.corpus import Document

ATTACHERS = {"add_docstr", "add_docstr_all", "add_newdoc", "add_newdoc_for_scalar_type"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Statements within statements; expressions hold no documentation and are most of the tree.
BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)
FILES_PER_TASK = 16


def package_version(package: str) -> str:
    """Version of an installed distribution without its build tag (+cpu, +cu128). Raises UserError if it is absent."""
    return _distribution(package).version.partition("+")[0]


def read_docstrings(packages: Sequence[str], workers: int) -> Iterator[Document]:
    """Yield the docstrings of the packages (distribution names), each package's files in order of their names.

    The order does not depend on `workers`, the number of processes. Files that this Python cannot parse are skipped.
    Raises UserError if a package is not installed or came without a list of its files.
    """
    files = [file for package in packages for file in _source_files(package)]
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    # Syntax trees are large and free of cycles: without the collector they are parsed a third faster.
    with closing(in_order(read_modules, tasks, workers, gc.disable)) as results:
        yield from chain.from_iterable(results)


def read_modules(files: Sequence[tuple[str, str]]) -> list[Document]:
    """All docstrings of some source files, each given as (dotted module name, path)."""
    return [document for file in files for document in read_module(file)]


def read_module(file: tuple[str, str]) -> list[Document]:
    """All docstrings of one source file, given as (dotted module name, path)."""
    module, path = file
    source = Path(path).read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    return list(_own_docstring(tree, module)) + list(_walk(tree, module))


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"prepare.packages names {package}, which is not installed; install it or remove it from the list"
        ) from error


def _source_files(package: str) -> list[tuple[str, str]]:
    """(module name, path) of the package's Python files but its tests."""
    distribution = _distribution(package)
    if distribution.files is None:
        raise UserError(f"prepare.packages: {package} has no list of installed files; reinstall it with pip")
    files = []
    for file in sorted(distribution.files, key=lambda file: file.as_posix()):
        parts = file.with_suffix("").parts
        if file.suffix == ".py" and not {"..", "tests"} & set(parts):
            files.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), str(file.locate())))
    return files


def _walk(node: ast.AST, name: str) -> Iterator[Document]:
    """Docstrings below `node`, whose qualified name is `name`, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            inner = f"{name}.{child.name}"
            yield from _own_docstring(child, inner)
            yield from _walk(child, inner)
        elif isinstance(child, ast.Expr | ast.Assign):
            yield from _attached(child, name)
        elif isinstance(child, BLOCKS):
            yield from _walk(child, name)


def _own_docstring(node: Documented, name: str) -> Iterator[Document]:
    if text := ast.get_docstring(node):
        yield _document(text, name)


def _attached(node: ast.Expr | ast.Assign, module: str) -> Iterator[Document]:
    """The text of `add_docstr(torch.add, text)`, `det = _add_docstr(_linalg.det, text)`, `add_newdoc(a, b, text)`.

    numpy also writes (method, text), or a list of such pairs, for the text. A name without a dot gets the module's
    before it.
    """
    call = node.value
    if not isinstance(call, ast.Call) or _called(call) not in ATTACHERS or len(call.args) < 2:
        return
    *target, last = call.args
    if isinstance(node, ast.Assign):
        target = node.targets
    name = ".".join(_literal(part) or ast.unparse(part) for part in target)
    if "." not in name:
        name = f"{module}.{name}"
    for entry in last.elts if isinstance(last, ast.List) else [last]:
        match entry:
            case ast.Tuple(elts=[method, body]):
                full_name = f"{name}.{_literal(method)}"
            case body:
                full_name = name
        if text := inspect.cleandoc(_literal(body)):
            yield _document(text, full_name)


def _called(call: ast.Call) -> str:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name.lstrip("_")


def _literal(node: ast.expr) -> str:
    """The text of a string expression as far as it is written out; "" if nothing is.

    Sums are joined. Fields of `"…".format(…)` appear as their names, since their values exist only at run time.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return "".join(text + (field or "") for text, field, *_ in Formatter().parse(_literal(node.func.value)))
    return ""


def _document(text: str, name: str) -> Document:
    # A lone surrogate, which UTF-8 cannot hold, is written as its escape.
    return Document(text.encode("utf-8", "backslashreplace").decode("utf-8"), name)
