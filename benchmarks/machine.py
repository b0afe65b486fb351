"""What a figure was measured with: the machine, the versions, the checkpoint. It stands in every JSON file."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def measured_with(checkpoint: str | Path | None = None) -> dict[str, Any]:
    """`date` (UTC), `machine`, `versions`, and the checkpoint's name and digest where a folder is given."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory(),
            "system": f"{platform.system()} {platform.release()}",
            "accelerator": _accelerator(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in ("fastblt", "torch") if (found := _version(name))},
        },
    }
    if checkpoint is not None and Path(checkpoint).is_dir():
        result["checkpoint"] = {"name": Path(checkpoint).resolve().name, "sha256": checkpoint_digest(Path(checkpoint))}
    return result


def checkpoint_digest(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of a checkpoint's weights: it changes when the checkpoint does."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
