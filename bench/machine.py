"""What a benchmark ran on, for the head of its page."""

import platform
from pathlib import Path


def describe_processor(threads: int) -> str:
    """Name, family and model as the operating system tells them, and the threads in use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    model = named.get("model name") or platform.processor()
    family = f", family {named['cpu family']}, model {named['model']}" if "cpu family" in named else ""
    return f"{model}{family}, {threads} threads"
