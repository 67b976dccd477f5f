"""What decides the bits of a floating-point sum: the processor, the libraries, and the variables that steer them.

Libraries choose kernels by instruction set and vendor, and block their loops by family and model, so that the same
program adds in another order elsewhere.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

CPUINFO = Path("/proc/cpuinfo")
# Names in /proc/cpuinfo on x86 and on ARM.
FIELDS = {
    "vendor": ("vendor_id", "CPU implementer"),
    "family": ("cpu family", "CPU architecture"),
    "model": ("model", "CPU part"),
}
# Instruction sets for which torch, oneDNN, MKL, OpenBLAS or NumPy hold kernels of their own.
INSTRUCTIONS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "svebf16"),
)
STEERING = (
    *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE"),
    *("NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES", "GLIBC_TUNABLES"),
)


def describe_processor(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Everything that decides the bits, as one flat map of text; machines with equal maps compute equal bits."""
    fields = read_cpuinfo(cpuinfo) if cpuinfo.is_file() else {"model": _brand()}
    flags = set(fields.pop("flags", "").split())
    # NumPy multiplies by OpenBLAS everywhere, torch where it has no MKL; the pipeline multiplies with torch alone.
    steering = STEERING if torch.backends.mkl.is_available() else (*STEERING, "OPENBLAS_CORETYPE")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        **fields,
        "instructions": " ".join(name for name in INSTRUCTIONS if name in flags),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: os.environ[name] for name in steering if name in os.environ},
    }


def read_cpuinfo(path: Path) -> dict[str, str]:
    """Vendor, family, model and flags of the first processor listed."""
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in pairs}
    named = {**FIELDS, "flags": ("flags", "Features")}
    return {name: lines[key] for name, keys in named.items() for key in keys if key in lines}


def _brand() -> str:
    """Name of the processor where there is no /proc/cpuinfo."""
    if platform.system() != "Darwin":
        return platform.processor()
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def list_differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """`name: here (recorded)` for all that two descriptions do not share."""
    return [
        f"{name}: {here.get(name, 'not set')} (recorded: {recorded.get(name, 'not set')})"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]
