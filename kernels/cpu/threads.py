"""How many threads C code may use."""

from __future__ import annotations

from pathlib import Path

import torch

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
    """Let C code use so many threads from now on; None: as many as torch's operations."""
    global _threads
    _threads = count


def threads() -> int:
    """How many threads C code may use."""
    return torch.get_num_threads() if _threads is None else _threads
