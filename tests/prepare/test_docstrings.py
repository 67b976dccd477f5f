"""Documentation is read from source files alone, completely, and in one order."""

import ast
from importlib import metadata
from pathlib import Path

import pytest

from gpt2.pipeline.files import UserError
from gpt2.prepare.docstrings import package_version, read_docstrings, read_module

SOURCE = '''"""Module text."""
import does_not_exist_anywhere
raise SystemExit("this file must not be executed")

class Outer:
    """Outer text."""
    class Inner:
        """
        Inner text,
            indented.
        """
    def method(self):
        """Method text."""
        def local():
            """Local text."""

if does_not_exist_anywhere:
    async def conditional():
        """Conditional text."""
else:
    try:
        def tried(): "Tried text."
    except ValueError:
        def handled(): """Handled text."""
    finally:
        def final(): """Final text."""

add_docstr(torch.add, r"""Text of \\alpha.""")
det = _add_docstr(_linalg.det, """Sum """ + """of texts.""")
_C.add_docstr(lib.scale, """Args: {input} and {{braces}}.""".format(**common) + """ Tail.""")
add_newdoc("pkg.core", "array", """Array text.""")
add_newdoc("pkg.core", "array", ("T", """Transposed text."""))
add_newdoc("pkg.core", "array", [("size", """Size text."""), ("ndim", """Dimensions text.""")])
unrelated("pkg.core", """Not documentation.""")
"""A string that documents nothing."""
'''


def write_package(folder: Path, name: str, files: dict[str, str], version: str = "1.2.3+cpu") -> None:
    """An installed distribution: sources next to a dist-info folder that lists them."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in sorted(files, reverse=True)))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable-looking package `studied` of several files."""
    files = {f"studied/part_{i:02d}.py": f'"""Text of part {i}."""\n' for i in range(40)}
    files |= {
        "studied/__init__.py": '"""The package."""\n',
        "studied/tests/test_part.py": '"""A test says nothing."""\n',
        "studied/broken.py": '"""Cut off."""\ndef (:\n',
        "studied/data.txt": '"""Not source."""\n',
    }
    write_package(tmp_path, "studied", files)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "studied"


def test_every_kind_of_docstring_is_found_once_and_nothing_is_run(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE, encoding="utf-8")
    found = {document.id: document.text for document in read_module(("pkg.source", str(path)))}
    assert found == {
        "pkg.source": "Module text.",
        "pkg.source.Outer": "Outer text.",
        "pkg.source.Outer.Inner": "Inner text,\n    indented.",
        "pkg.source.Outer.method": "Method text.",
        "pkg.source.Outer.method.local": "Local text.",
        "pkg.source.conditional": "Conditional text.",
        "pkg.source.tried": "Tried text.",
        "pkg.source.handled": "Handled text.",
        "pkg.source.final": "Final text.",
        "torch.add": "Text of \\alpha.",
        "pkg.source.det": "Sum of texts.",
        "lib.scale": "Args: input and {braces}. Tail.",
        "pkg.core.array": "Array text.",
        "pkg.core.array.T": "Transposed text.",
        "pkg.core.array.size": "Size text.",
        "pkg.core.array.ndim": "Dimensions text.",
    }


def test_agrees_with_a_walk_over_every_node_of_a_real_module():
    path = ast.__file__
    nodes = ast.walk(ast.parse(Path(path).read_bytes()))
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = {ast.get_docstring(node) for node in nodes if isinstance(node, definitions)} - {None, ""}
    assert len(expected) > 30
    assert {document.text for document in read_module(("ast", path))} == expected


def test_files_come_in_order_of_their_names_without_tests_broken_and_foreign_ones(package):
    ids = [document.id for document in read_docstrings([package], workers=1)]
    assert ids == ["studied", *(f"studied.part_{i:02d}" for i in range(40))]


def test_worker_processes_change_nothing(package):
    packages = [package, "pydantic"]
    alone = list(read_docstrings(packages, workers=1))
    assert len(alone) > 100
    assert list(read_docstrings(packages, workers=2)) == alone


def test_every_text_can_be_written_as_utf8(tmp_path):
    path = tmp_path / "surrogate.py"
    path.write_text('"""A lone \\ud800 surrogate."""\n')
    (document,) = read_module(("surrogate", str(path)))
    assert document.text.encode("utf-8") == b"A lone \\ud800 surrogate."


def test_the_version_leaves_out_the_build(package):
    assert package_version(package) == "1.2.3"
    assert metadata.version(package) == "1.2.3+cpu"


def test_an_absent_package_is_named():
    with pytest.raises(UserError, match=r"prepare\.packages names no-such-package.*install"):
        list(read_docstrings(["no-such-package"], workers=1))


def test_a_package_without_a_file_list_is_refused(tmp_path, monkeypatch):
    write_package(tmp_path, "unlisted", {"unlisted.py": '"""Text."""\n'}, version="1.0")
    (tmp_path / "unlisted-1.0.dist-info" / "RECORD").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"unlisted has no list of installed files"):
        list(read_docstrings(["unlisted"], workers=1))
