"""List the commands: python -m gpt2"""

import ast
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = ("check", "params", "status", "generate", "hellaswag", "export")


def summarise_command(name: str) -> str:
    """First line of the docstring of `gpt2.<name>`, read without importing it."""
    path = HERE / f"{name}.py"
    source = path if path.is_file() else HERE / name / "__main__.py"
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]


def main() -> None:
    lines = [f"python -m gpt2.{name:<10} {summarise_command(name)}" for name in COMMANDS]
    sys.stdout.write("\n".join([*lines, "", "Each takes --help. The pipeline itself: dvc repro"]) + "\n")


if __name__ == "__main__":
    main()
