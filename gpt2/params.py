"""Print the parameters of a scale as YAML, or only those that differ from another scale.

python -m gpt2.params short [--against tiny]
"""

import json
import sys
from typing import Any

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import PARAMS_FILE, SCALES, active_scale, read


def render(block: dict[str, Any], other: dict[str, Any] | None = None, name: str = "") -> str:
    """Return the sections of a scale as YAML, one key a line.

    With `other`, another scale called `name`: only keys that are absent there or have another value, which follows as a
    comment. Keys that only `other` has are left out.
    """
    lines = []
    for section, values in block.items():
        elsewhere = (other or {}).get(section, {})
        found = [key for key, value in values.items() if elsewhere.get(key, ...) != value]
        lines += [f"{section}:"] if found else []
        for key in found:
            there = _show(elsewhere[key]) if key in elsewhere else "absent"
            lines.append(f"  {key}: {_show(values[key])}" + ("" if other is None else f"  # {name}: {there}"))
    return "\n".join(lines) + "\n"


def _show(value: object) -> str:
    # JSON is YAML, and needs one line for a list.
    return json.dumps(value, ensure_ascii=False, default=str)


def _block(values: dict[str, Any], scale: str) -> dict[str, Any]:
    block = values[active_scale({**values, "scale": scale})]
    for section, keys in block.items():
        if not isinstance(keys, dict):
            raise UserError(f"{scale}.{section} = {keys!r} must be a map of keys and values; correct {PARAMS_FILE}")
    return block


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m gpt2.params", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scale", nargs="?", choices=SCALES, help=f"block of {PARAMS_FILE}; default: the one in use")
    parser.add_argument("--against", choices=SCALES, help="print only what differs from this scale")
    arguments = parser.parse_args(argv)
    with reporting("params"):
        values = read()
        block = _block(values, arguments.scale or active_scale(values))
        other = _block(values, arguments.against) if arguments.against else None
        sys.stdout.write(render(block, other, arguments.against))


if __name__ == "__main__":
    main()
