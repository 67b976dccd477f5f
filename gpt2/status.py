"""Show step, loss, tokens/s and ETA of a training run in progress. Needs no DVC lock."""

import json
import os
import time
from pathlib import Path

from gpt2.pipeline.command import Parser, reporting
from gpt2.train.heartbeat import is_alive, read_heartbeats

SCRATCH = ".scratch"


def describe(folder: Path, beat: dict, now: float) -> str:
    """One run as lines of text; `now` is the time in seconds since 1970."""
    alive, age = is_alive(beat), now - beat["time"]
    state = {
        True: f"{beat['doing']}, process {beat['pid']}",
        False: "stopped before its end; the next `dvc repro` resumes it",
        None: f"{beat['doing']} on {beat['host']}, process {beat['pid']} there",
    }[alive]
    saved = "none yet"
    if beat["checkpoint_step"]:
        written = beat["checkpoint_time"]
        saved = f"step {beat['checkpoint_step']:,}" + (f", {_duration(now - written)} ago" if written else "")
    values = {
        "state": f"{state} (heartbeat {_duration(age)} ago)",
        "step": f"{beat['step']:,} of {beat['max_steps']:,} ({beat['step'] / beat['max_steps']:.1%})",
        "loss": _number(beat["loss"], ".4f"),
        "val loss": _number(beat["val_loss"], ".4f"),
        "rate": f"{beat['tokens_per_s']:,.0f} tokens/s, {beat['data_wait_percent']:.2f} % of it waiting for data",
        "left": _duration(beat["eta_s"]) if beat["eta_s"] is not None else "-",
        "checkpoint": saved,
    }
    return "\n".join([f"{folder}", *(f"  {name:<11}{value}" for name, value in values.items())])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def main(argv: list[str] | None = None) -> None:
    """Print every run in scratch, the latest first; exit with 1 if there is none."""
    parser = Parser(prog="python -m gpt2.status", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    with reporting("status"):
        runs = read_heartbeats(Path(os.environ.get("DVC_ROOT", "."), SCRATCH))
        if not runs:
            raise SystemExit("no training is in progress, and none waits to be resumed")
        for folder, beat in runs:
            if arguments.json:
                print(json.dumps({"folder": str(folder), "alive": is_alive(beat), **beat}))
            else:
                print(describe(folder, beat, time.time()))


if __name__ == "__main__":
    main()
