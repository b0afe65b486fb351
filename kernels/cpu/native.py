"""C code of the CPU path: compiled once per machine with the system's compiler, loaded with ctypes.

Where there is no compiler, the torch paths serve; they are slower and otherwise equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).resolve().parent
# Sums are reordered only where the source says so; NaN and infinity survive.
_FLAGS = ["-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]


def _cpu_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            known = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            return []
        return ["-mavx2", "-mfma"] if {"avx2", "fma"} <= known else []
    return []


#: Where a container finds how much of a processor it may use: microseconds, or max, and of how many.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_threads: int | None = None


def cores(quota: Path = _QUOTA) -> int:
    """Cores for this process: what torch found, or was told by OMP_NUM_THREADS, within the container's quota."""
    found = torch.get_num_threads()
    try:
        most, period = quota.read_text().split()
        return found if most == "max" else max(1, min(found, -(-int(most) // int(period))))
    except (OSError, ValueError):
        return found


def set_threads(count: int | None) -> None:
    """How many threads C code may use from now on; None: as many as torch's operations."""
    global _threads
    _threads = count


def threads() -> int:
    """How many threads C code may use."""
    return torch.get_num_threads() if _threads is None else _threads


@cache
def library(name: str, *more_flags: str) -> ctypes.CDLL | None:
    """The library made from kernels/<name>.c, or None where it cannot be compiled or loaded.

    `FASTBLT_NATIVE=0` turns native code off. The result is kept under the user's cache folder, keyed by the sources and
    the flags, to which `more_flags` are added.
    """
    if os.environ.get("FASTBLT_NATIVE") == "0":
        return None
    source = _SOURCES / f"{name}.c"
    flags = [*_FLAGS, *_cpu_flags(), *more_flags]
    code = b"".join(path.read_bytes() for path in (source, *sorted(_SOURCES.glob("*.[ch]"))))
    digest = hashlib.sha256(code + " ".join([*flags, platform.machine()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastblt"
    target = folder / f"{name}-{digest}.so"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Compiled beside and moved into place: two processes that start together never see half a file.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                compiler = os.environ.get("CC", "cc")
                subprocess.run(
                    [compiler, *flags, "-o", str(built), str(source), "-lm"],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
                built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None
