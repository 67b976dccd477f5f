"""What a benchmark ran on, for the head of its page."""

import os
import platform
import sys
from pathlib import Path

# Average number of waiting processes above which the machine is not the benchmark's own.
BUSY = 0.5


def describe_processor() -> str:
    """Name, and family and model where the system reports them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {key.strip(): value.strip() for key, value in pairs}
    model = named.get("model name") or platform.processor()
    return model + (f", family {named['cpu family']}, model {named['model']}" if "cpu family" in named else "")


def warn_if_busy() -> None:
    """Say on stderr that other processes are at work, if they are."""
    if (busy := os.getloadavg()[0]) > BUSY:
        sys.stderr.write(f"bench: other processes are at work (load {busy:.1f}); rates will be too low and uneven\n")
