"""Counts the kernels that a pass launches and the copies that it makes, by method.

    python -m fastblt.benchmarks.engine.launches    BLT, BLT-S, BLT-DV and BLT-D, two requests each

Runs the shipped checkpoint as on a GPU: Triton kernels (in the interpreter if there is no GPU), rows padded to buckets,
integers staged, results fetched in one copy. It counts calls of Triton kernels, calls of torch operators that launch a
kernel (views and allocations do not), copies to the device (`Staging.send`) and copies back to the host, including
reads of single values. Figures are per decoder pass and include the other modules' passes. The parts are the functions
of `server/engine/device/forward.py`, sampling and packing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# This must be set before triton is imported.
os.environ.setdefault("FASTBLT_KERNELS", "triton")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import replaced, start, submit, whole_length
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding, with_diffusion
from fastblt.kernels.backend import interpreted
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.staging import Fetch, Staging
from fastblt.server.engine.runner.sampler import Sampler
from fastblt.server.settings import PRETRAINED

#: Operators of torch that only describe or allocate memory.
_NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::empty_strided", "aten::detach", "aten::alias", "prim::device")
_READS = ("aten::_local_scalar_dense", "aten::nonzero")

PARTS: list[tuple[Any, str]] = [
    (ModuleForward, "entropies"),
    (ModuleForward, "encode"),
    (ModuleForward, "upstream"),
    (ModuleForward, "decode"),
    (Sampler, "choose"),
    (Fetch, "pack"),
]


KINDS = ("triton", "torch", "to device", "to host")


class Counts(TorchDispatchMode):
    """Counts launches and copies by part of the pass and kind (`KINDS`)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.part = "other"
        self.calls: Counter[str] = Counter()
        self._within = False

    def note(self, kind: str) -> None:
        self.counts[self.part, kind] += 1

    def launch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count a Triton launch. torch operators that the interpreter calls inside it are not counted."""

        def launched(*args: Any, **kwargs: Any) -> Any:
            self.note("triton")
            self._within = True
            try:
                return call(*args, **kwargs)
            finally:
                self._within = False

        return launched

    def within(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            self.calls[part] += 1
            try:
                return call(*args, **kwargs)
            finally:
                self.part = before

        return inside

    def counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(kind)
            return call(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not self._within and not func.is_view and name not in _NO_KERNEL:
            self.note("to host" if name in _READS else "torch")
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counts]:
    """Count launches and copies of the engine's passes."""
    counts = Counts()
    parts = [(place, name, partial(counts.within, name)) for place, name in PARTS]
    if interpreted():
        from triton.runtime.interpreter import GridExecutor

        launches = (GridExecutor, "__call__", counts.launch)
    else:
        from triton.runtime.jit import JITFunction

        launches = (JITFunction, "run", counts.launch)
    copies = [
        (Staging, "send", partial(counts.counted, "to device")),
        (Fetch, "__call__", partial(counts.counted, "to host")),
    ]
    with replaced(*parts, *copies, launches), counts:
        yield counts


def count(model: Blt, prompts: list[list[int]], setting: str, passes: int, device: str) -> dict[str, dict[str, float]]:
    """Counts per decoder pass, by part and kind, after the prompts' passes. "calls" is how often a part ran."""
    engine = start(model, len(prompts), max_model_len=384, device=device)
    for seed, ids in enumerate(prompts):
        submit(engine, ids, whole_length(decoding(setting), 256, seed=seed))
    for _ in range(len(prompts) + 1):
        engine.step()
    with counting() as counts:
        for _ in range(passes):
            engine.step()
    rows: dict[str, dict[str, float]] = {}
    for (part, kind), number in counts.counts.items():
        rows.setdefault(part, {})[kind] = number / passes
    for part, number in counts.calls.items():
        rows.setdefault(part, {})["calls"] = number / passes
    rows["all"] = {
        kind: sum(number for (_, k), number in counts.counts.items() if k == kind) / passes for kind in KINDS
    }
    return rows


def measure(
    *,
    model: str = str(PRETRAINED),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    requests: int = 2,
    passes: int = 20,
) -> dict[str, Any]:
    """Launches and copies of every method, by part of the pass."""
    blt = load_checkpoint(model, device=device)
    prompts = held_out_prompts(requests, 24)
    result = {}
    table = Table("method", "part", "runs a pass", "Triton launches", "torch launches", "to device", "to host")
    for name in with_diffusion(blt.config.block_sizes):
        result[name] = count(blt, prompts, name, passes, device)
        for part, row in result[name].items():
            table.row(name, part, *(f"{row.get(kind, 0.0):.2f}" for kind in ("calls", *KINDS)))
    return {"passes": passes, "requests": requests, "methods": result}


app = command(measure)

if __name__ == "__main__":
    app()
