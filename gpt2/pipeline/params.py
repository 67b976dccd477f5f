"""The only place that reads params.yaml.

Every section of the active scale is loaded into a frozen `Config` that is defined in the module that uses it. Loading
is strict: an unknown, missing, mistyped or out-of-range value raises before any work, with key, value, rule and remedy.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML, YAMLError

from gpt2.pipeline.files import UserError

PARAMS_FILE = Path("params.yaml")
Scale = Literal["tiny", "short", "full"]
SCALES: tuple[str, ...] = get_args(Scale)
REMEDY = f"; change it in {PARAMS_FILE} or with `dvc exp run -S KEY=VALUE`"


class Config(BaseModel):
    """Base of all parameter sections: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def read(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Parse params.yaml as YAML 1.2, in which DVC's `1e-05` is a number (YAML 1.1 reads a string)."""
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run from the root of the repository") from error
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a map with the keys norm, scale, {', '.join(SCALES)}")
    return values


def active_scale(values: dict[str, Any]) -> str:
    """Name of the scale block in use. Raises UserError if it is not one of SCALES or its block is absent."""
    scale = values.get("scale")
    if scale not in SCALES or not isinstance(values.get(scale), dict):
        raise UserError(f"scale={scale!r} must name one of the blocks {', '.join(SCALES)} of {PARAMS_FILE}")
    return scale


def top(key: str) -> object:
    """The value of a key at the top of params.yaml. Raises UserError if it is absent."""
    values = read()
    if key not in values:
        raise UserError(f"{PARAMS_FILE} lacks the key {key}; add it at the top")
    return values[key]


def load(section: str, cls: type[C], values: dict[str, Any] | None = None, **known: object) -> C:
    """Build `cls` from a section of the active scale.

    `known` are fields whose value comes from elsewhere (`norm` from the top of the file, `vocab_size` from the tokens);
    the section itself may not give them. Raises UserError listing every fault of the section at once.
    """
    values = read() if values is None else values
    scale = active_scale(values)
    if section not in values[scale]:
        raise UserError(f"{PARAMS_FILE} lacks the section {scale}.{section}; copy it from another scale and adapt it")
    return build(cls, values[scale][section], f"{scale}.{section}", REMEDY, **known)


def build(cls: type[C], section: object, path: str, remedy: str = "", **known: object) -> C:
    """Validate a mapping read from `path` (a dotted key, or "") strictly into `cls`; faults end with `remedy`."""
    if not isinstance(section, dict):
        raise UserError(f"{path} = {section!r} must be a map of {', '.join(cls.model_fields)}")
    if twice := sorted(known.keys() & section.keys()):
        raise UserError(f"{path} must not set {', '.join(twice)}: it is given elsewhere; remove it")
    try:
        # Through JSON, because strict mode takes a list for a tuple only there. JSON has no dates, as YAML has.
        return cls.model_validate_json(json.dumps({**section, **known}, default=str))
    except ValidationError as error:
        raise UserError("\n".join(_explain(fault, cls, path, known) + remedy for fault in error.errors())) from error


def _explain(fault: Mapping[str, Any], cls: type[Config], path: str, known: Iterable[str]) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location if not path or (location and location[0] in known) else [path, *location])
    fields: Mapping[str, Any] = cls.model_fields
    for part in location[:-1]:
        fields = getattr(getattr(fields.get(part), "annotation", None), "model_fields", fields)
    rule = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
        return f"{key} = {fault['input']!r} is not a known key; {hint}"
    # A rule about a whole section names the values that break it.
    whole = fault["type"] == "value_error" and isinstance(fault["input"], dict)
    return f"{key}: {rule}" if whole else f"{key} = {fault['input']!r}: {rule}"
