"""Check that a run can start, and estimate how long training will take. Needs no DVC lock.

python -m gpt2.check [--scale full]
"""

from typing import Any

from gpt2.check.estimate import load_plan
from gpt2.check.preflight import CHECKS, WARNING, check_time
from gpt2.check.schema import find_faults
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import PARAMS_FILE, SCALES, active_scale, read

FAIL = "FAIL"


def examine(values: dict[str, Any], scale: str) -> list[tuple[str, str, str]]:
    """Return mark (ok, warning or FAIL), name and text of every check of one scale; time is the last, if none fails."""
    faults = "\n".join(find_faults(values))
    results = [(FAIL if faults else "ok", "parameters", faults or f"{PARAMS_FILE} and the vocabulary files are valid")]
    try:
        plan = load_plan(values, scale)
    except UserError:
        # One of the faults. All other checks need the parameters.
        return results
    for name, check in CHECKS.items():
        if check is check_time and any(mark == FAIL for mark, _, _ in results):
            break
        try:
            text = check(plan)
            mark = "warning" if text.startswith(WARNING) else "ok"
        except UserError as error:
            mark, text = FAIL, str(error)
        results.append((mark, name, text.removeprefix(WARNING)))
    return results


def main(argv: list[str] | None = None) -> None:
    """The command line above; exits with 1 if a check fails."""
    parser = Parser(prog="python -m gpt2.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, help=f"block of {PARAMS_FILE}; default: the one in use")
    scale = parser.parse_args(argv).scale
    with reporting("check"):
        values = read()
        scale = scale or active_scale(values)
        results = examine(values, scale)
    for mark, name, text in results:
        print(f"{mark:<8} {name:<11} " + text.replace("\n", f"\n{'':<21}"))
    if failed := [name for mark, name, _ in results if mark == FAIL]:
        print(f"\nNOT READY for {scale}: {', '.join(failed)}")
        raise SystemExit(1)
    print(f"\nREADY for {scale}")


if __name__ == "__main__":
    main()
