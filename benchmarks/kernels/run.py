"""Measures the Triton kernels: the bytes that they move, and their time.

    python -m fastblt.benchmarks.kernels.run traffic   bytes loaded and stored, under Triton's interpreter
    python -m fastblt.benchmarks.kernels.run gpu       microseconds on the GPU here

`traffic` compares launches and bytes with the least possible, and with the separate operations of the torch version.
Its exit status is 1 if a kernel moves over a quarter more than the least, or than its case allows. `gpu` times each
kernel and those operations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import replaced
from fastblt.benchmarks.machine import fastest
from fastblt.benchmarks.markdown import Table


class Meter:
    """Counts the bytes that kernels load and store in the interpreter. A load or store counts each address once."""

    def __init__(self, inner: Any, interface: list[Any]) -> None:
        self._inner = inner
        self._ranges: list[tuple[int, int]] = []
        self._loads: list[Any] = []
        self._stores: list[Any] = []
        self.loaded = self.stored = 0
        self.add(interface)

    def add(self, interface: list[Any]) -> None:
        """Add arguments or results of the operation."""
        self._ranges += [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in interface]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.loaded += self._count(self._loads, pointers, mask, dtype.itemsize)
        return self._inner.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.stored += self._count(self._stores, pointers, mask, value.dtype.itemsize)
        return self._inner.store(pointers, value, mask)

    def _count(self, seen: list[Any], pointers: Any, mask: Any, size: int) -> int:
        addresses = np.unique(pointers[mask])
        seen.append((addresses[:, None] + np.arange(size, dtype=addresses.dtype)).ravel())
        return addresses.size * size

    def least(self) -> int:
        """The bytes of the operation's own arguments and results that were loaded, and those that were stored, each
        counted once."""
        return self._inside(self._loads) + self._inside(self._stores)

    def _inside(self, seen: list[Any]) -> int:
        touched = np.unique(np.concatenate(seen))
        inside = np.zeros(touched.shape, dtype=bool)
        for begin, length in dict.fromkeys(self._ranges):
            inside |= (touched >= begin) & (touched < begin + length)
        return int(inside.sum())


def torch_cost(call: Callable[[], Any]) -> tuple[int, int]:
    """The bytes that the operations of a torch function read (arguments) and write (results), and the number of
    operations. Views cost nothing."""
    total = operations = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total, operations
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            given, made = (
                [t for t in tree_flatten(x)[0] if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out)
            )
            if func.is_view or name.startswith("empty"):
                return out
            if name in ("embedding", "index", "index_select", "gather"):
                given = given[1:] + made  # of the table, only the rows that are read
            elif name == "index_copy_":
                given, made = given[1:], given[-1:]
            operations += 1
            total += sum(t.numel() * t.element_size() for t in given + made)
            return out

    with Counting():
        call()
    return total, operations


def traffic() -> dict[str, Any]:
    """The bytes that each kernel moves. Starts another process, since Triton chooses its interpreter when imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command_line = [sys.executable, *sys.orig_argv[1:]]
        raise typer.Exit(subprocess.run(command_line, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode)
    import triton.runtime.interpreter as interpreter

    from fastblt.benchmarks.kernels.cases import cases

    rows: dict[str, dict[str, float]] = {}
    launches = 0

    def counted(launch: Callable[..., None]) -> Callable[..., None]:
        def call(executor: Any, *arguments: Any, **options: Any) -> None:
            nonlocal launches
            launches += 1
            launch(executor, *arguments, **options)

        return call

    table = Table("operation", "launches", "torch", "loaded", "stored", "least", "ratio", "torch moves", "ratio")
    for case in cases():
        meter, launches = Meter(interpreter._interpreter, case.arguments), 0
        metered = (interpreter, "_interpreter", lambda _, meter=meter: meter)
        with replaced(metered, (interpreter.GridExecutor, "__call__", counted)):
            results = case.fused()
        meter.add(results)
        (apart, operations), moved, least = torch_cost(case.unfused), meter.loaded + meter.stored, meter.least()
        rows[case.name] = {"launches": launches, "moved": moved, "least": least, "torch": apart, "most": case.most}
        counts = [f"{count:,}" for count in (launches, operations, meter.loaded, meter.stored, least)]
        table.row(case.name, *counts, f"{moved / least:.2f}", f"{apart:,}", f"{apart / least:.1f}")
    return {"cases": rows, "passed": all(row["moved"] <= row["most"] * row["least"] for row in rows.values())}


def gpu(*, rounds: int = 50) -> dict[str, Any]:
    """Microseconds of each kernel: the fastest of `rounds` calls."""
    if not torch.cuda.is_available():
        print("there is no GPU here, or this is not a build of torch that sees it", file=sys.stderr)
        return {"passed": False}
    torch.set_default_device("cuda")
    print(torch.cuda.get_device_name())
    return {"cases": speed(rounds, torch.cuda.synchronize)}


def speed(rounds: int, wait: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Microseconds of each call on torch's default device, fused and in torch. `wait` waits for the device."""
    from fastblt.benchmarks.kernels.cases import cases

    rows: dict[str, dict[str, float]] = {}
    table = Table("operation", "fused, us", "torch, us", "ratio")
    for case in cases():
        calls = {"fused": case.fused, "torch": case.unfused}
        taken = {name: 1e6 * fastest(_waited(call, wait), rounds) for name, call in calls.items()}
        rows[case.name] = taken
        table.row(case.name, *(f"{own:.1f}" for own in taken.values()), f"{taken['torch'] / taken['fused']:.1f}")
    return rows


def _waited(call: Callable[[], Any], wait: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        call()
        wait()

    return both


app = command(traffic, gpu)

if __name__ == "__main__":
    app()
