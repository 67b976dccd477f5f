"""Show step, loss, tokens/s and ETA of a training run in progress. Needs no DVC lock."""

import json
import time
from pathlib import Path

from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.quantities import show_time
from gpt2.pipeline.scratch import scratch_root
from gpt2.train.heartbeat import is_alive, read_heartbeats


def describe(folder: Path, beat: dict, now: float) -> str:
    """One run as lines of text; `now` is the time in seconds since 1970."""
    alive, age = is_alive(beat), now - beat["time"]
    state = {
        True: f"{beat['doing']}, process {beat['pid']}",
        False: "stopped before its end; the next `dvc repro` resumes it",
        None: f"{beat['doing']} on {beat['host']}, process {beat['pid']} there",
    }[alive]
    losses = {"loss": beat["loss"], "val loss": beat["val_loss"]}
    saved = "none yet"
    if beat["checkpoint_step"]:
        written = beat["checkpoint_time"]
        saved = f"step {beat['checkpoint_step']:,}" + (f", {show_time(now - written)} ago" if written else "")
    values = {
        "state": f"{state} (heartbeat {show_time(age)} ago)",
        "step": f"{beat['step']:,} of {beat['max_steps']:,} ({beat['step'] / beat['max_steps']:.1%})",
        **{name: "-" if loss is None else f"{loss:.4f}" for name, loss in losses.items()},
        "rate": f"{beat['tokens_per_s']:,.0f} tokens/s, {beat['data_wait_percent']:.2f} % of it waiting for data",
        "left": show_time(beat["eta_s"]) if beat["eta_s"] is not None else "-",
        "checkpoint": saved,
    }
    return "\n".join([f"{folder}", *(f"  {name:<11}{value}" for name, value in values.items())])


def main(argv: list[str] | None = None) -> None:
    """Print every run in scratch, the latest first; exit with 1 if there is none."""
    parser = Parser(prog="python -m gpt2.status", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    with reporting("status"):
        runs = read_heartbeats(scratch_root())
        if not runs:
            raise SystemExit("no training is in progress, and none waits to be resumed")
        for folder, beat in runs:
            if arguments.json:
                print(json.dumps({"folder": str(folder), "alive": is_alive(beat), **beat}))
            else:
                print(describe(folder, beat, time.time()))


if __name__ == "__main__":
    main()
