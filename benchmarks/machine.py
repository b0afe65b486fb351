"""Describes the conditions of a measurement, for its JSON file: the machine, the versions, the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def measured_with(checkpoint: str | Path | None = None) -> dict[str, Any]:
    """`date` (UTC), `machine`, `versions`, and the name and digest of the checkpoint if it is a folder."""
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


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON. Creates the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def checkpoint_digest(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of a checkpoint's weights: it changes when the checkpoint does."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def machine_limits(threads: int, device: str = "cpu") -> dict[str, float]:
    """The machine's limits: `read_gb_s`, GB per second of reading memory much larger than the caches, and `gflop_s`,
    10^9 fp32 operations per second in matrix products.

    Measured on `device`, with `threads` CPU threads.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = torch.ones(2**26, device=device)
        square = torch.ones(1024, 1024, device=device)
        # `float` copies the result to the host, and so waits for the device.
        read = fastest(lambda: float(block.sum()), 6)
        product = fastest(lambda: float((square @ square)[0, 0]), 6)
    finally:
        torch.set_num_threads(before)
    return {"read_gb_s": block.nbytes / read / 1e9, "gflop_s": 2 * 1024**3 / product / 1e9}


def fastest(call: Callable[[], object], rounds: int = 20) -> float:
    """The least seconds of one call, over `rounds` calls: the time without interruptions."""
    times = []
    for _ in range(rounds):
        clock = time.perf_counter()
        call()
        times.append(time.perf_counter() - clock)
    return min(times)


def finish() -> None:
    """Wait for a GPU, if there is one in use: its time is not that of the call which gave it work."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
