"""Print the parameters of a scale as YAML, or only those that differ from another scale.

python -m gpt2.params short [--against tiny]
"""

import json
import sys
from typing import Any

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import PARAMS_FILE, SCALES, active_scale, read


def render_block(block: dict[str, Any]) -> str:
    """All sections of a scale, one key a line."""
    return "".join(
        f"{section}:\n" + "".join(f"  {key}: {_show(value)}\n" for key, value in values.items())
        for section, values in block.items()
    )


def render_differences(block: dict[str, Any], other: dict[str, Any], name: str) -> str:
    """Keys of `block` with another value in `other`, or absent there; that value as a comment after `name`.

    Keys that only `other` has are left out.
    """
    lines = []
    for section, values in block.items():
        elsewhere = other.get(section, {})
        found = {key: value for key, value in values.items() if elsewhere.get(key, ...) != value}
        lines += [f"{section}:"] if found else []
        lines += [
            f"  {key}: {_show(value)}  # {name}: {_show(elsewhere[key]) if key in elsewhere else 'absent'}"
            for key, value in found.items()
        ]
    return "\n".join(lines) + "\n"


def _show(value: object) -> str:
    # JSON is YAML, and needs one line for a list.
    return json.dumps(value, ensure_ascii=False, default=str)


def _block(values: dict[str, Any], scale: str | None) -> dict[str, Any]:
    scale = active_scale({**values, "scale": scale} if scale else values)
    for section, keys in values[scale].items():
        if not isinstance(keys, dict):
            raise UserError(f"{scale}.{section} = {keys!r} must be a map of keys and values; correct {PARAMS_FILE}")
    return values[scale]


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m gpt2.params", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scale", nargs="?", choices=SCALES, help=f"block of {PARAMS_FILE}; default: the one in use")
    parser.add_argument("--against", choices=SCALES, help="print only what differs from this scale")
    arguments = parser.parse_args(argv)
    with reporting("params"):
        values = read()
        block = _block(values, arguments.scale)
        if arguments.against:
            text = render_differences(block, _block(values, arguments.against), arguments.against)
        else:
            text = render_block(block)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
