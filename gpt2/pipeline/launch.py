"""Start training processes by torchrun, as section `hardware` asks."""

import os
import sys

from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.interrupt import LAUNCHER, TORCHRUN_MARK
from gpt2.pipeline.params import load


def ensure_torchrun(module: str) -> None:
    """Replace this process by torchrun running `module`, unless torchrun started it or has nothing to do.

    One process that is not restarted after a crash needs no torchrun. Raises UserError if section `hardware` is wrong.
    """
    hardware = load("hardware", HardwareConfig)
    if TORCHRUN_MARK in os.environ or hardware.is_single_process:
        return
    # The shared store would hand the addresses of dead processes to the restarted ones (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # torchrun takes the place of this process and so its number.
    os.environ[LAUNCHER] = str(os.getpid())
    command = [sys.executable, "-m", "torch.distributed.run", *hardware.torchrun_arguments(), "-m", module]
    os.execv(sys.executable, command)
