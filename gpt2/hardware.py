"""What the machine gives. It changes how long a run takes, never which data it sees."""

from typing import Literal

from pydantic import PositiveInt

from gpt2.params import Config


class HardwareConfig(Config):
    """Section `hardware`, read at launch and no dependency of any stage."""

    # Training processes: a number, or `gpu` for one on every visible GPU.
    nproc: PositiveInt | Literal["gpu"]
    # CPU threads for arithmetic, shared by the processes. Fixed, since the bits of a sum depend on it.
    threads: PositiveInt
    # Processes or threads for text: reading, tokenizing.
    workers: PositiveInt
