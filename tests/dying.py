"""`stages.train` in a process that kills itself by SIGKILL at a point of its choice: `DIE_AT=point:step[:rank]`.

Points: `save` (half of the checkpoint of that step is written), `evaluate` (inside the validation after that many
steps), `step` (before the update of that step). A rank other than 0 needs torchrun; a restarted process lives on.
"""

import os
import signal
from pathlib import Path

from gpt2.train import checkpoint
from gpt2.train.loop import Evaluation, Stepper
from stages import train

POINT, STEP, RANK = (*os.environ["DIE_AT"].split(":"), "0")[:3]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm() -> None:
    """Put the trap."""
    if POINT == "save":
        save = checkpoint.save_file

        def save_half(tensors, path, metadata):
            save(tensors, path, metadata)
            if f"step_{int(STEP):08d}" in Path(path).name:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        checkpoint.save_file = save_half
    elif POINT == "evaluate":
        measure, calls = Evaluation.measure, []

        def measure_half(self, model, dist):
            calls.append(measure(self, model, dist))
            if len(calls) == int(STEP):
                die()
            return calls[-1]

        Evaluation.measure = measure_half
    else:
        update = Stepper.update

        def update_until(self, step):
            if step == int(STEP):
                die()
            update(self, step)

        Stepper.update = update_until


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == RANK and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm()
    train.main()
