"""What a pass gives a device to do: kernels launched and copies made, counted by method.

    python -m fastblt.benchmarks.engine.launches    BLT, BLT-S, BLT-DV and BLT-D, two requests each

Runs the shipped checkpoint as a GPU would: Triton kernels (under their interpreter, where there is no GPU), rows padded
to buckets, integers staged, results fetched in one copy. Counted are calls of Triton kernels, calls of torch's
operators that start a kernel (views and allocations do not), copies to the device (`Staging.send`) and copies back. A
read of a single value on the way would be a copy back too, and is counted as one. Figures are per decoder pass, with
what comes before and behind it; the parts are those of `server/engine/device/forward.py` and the choice of bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before triton is imported.
os.environ.setdefault("FASTBLT_KERNELS", "triton")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastblt.benchmarks.engine.holding import METHODS, endless
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.methods import diffusion
from fastblt.kernels.backend import interpreted
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.staging import Fetch, Staging
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.runner.sampler import Sampler
from fastblt.server.request import DecodingMethod, DecodingParams, Request
from fastblt.server.settings import PRETRAINED, EngineSettings

#: Operators that only describe or allocate memory.
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


class Counts(TorchDispatchMode):
    """Counts by part of the pass: (part, "triton" | "torch" | "to device" | "to host")."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.part = "other"
        self.calls: Counter[str] = Counter()
        self._within = False

    def note(self, kind: str) -> None:
        self.counts[self.part, kind] += 1

    def launch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A Triton launch; what its interpreter does inside is not the device's."""

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
    """Count what the engine's passes do."""
    counts = Counts()
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (place, name, counts.within(name, getattr(place, name))) for place, name in PARTS
    ]
    places.append((Staging, "send", counts.counted("to device", Staging.send)))
    places.append((Fetch, "__call__", counts.counted("to host", Fetch.__call__)))
    if interpreted():
        from triton.runtime.interpreter import GridExecutor

        places.append((GridExecutor, "__call__", counts.launch(GridExecutor.__call__)))
    else:
        from triton.runtime.jit import JITFunction

        places.append((JITFunction, "run", counts.launch(JITFunction.run)))
    originals = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, changed in places:
        setattr(place, name, changed)
    try:
        with counts:
            yield counts
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def count(
    model: Blt, prompts: list[list[int]], decoding: DecodingParams, passes: int, device: str
) -> dict[str, dict[str, float]]:
    """Counts per decoder pass, by part and kind, once the prompts are read; "calls" says how often a part ran."""
    settings = EngineSettings(max_running=len(prompts), max_model_len=1024, device=device)
    engine = Engine(model, settings)
    for index, (ids, params) in enumerate(zip(prompts, endless(decoding, len(prompts), 0.0), strict=True)):
        engine.add(Request(str(index), ids, params.__class__(**{**vars(params), "max_tokens": 256}), 0.0))
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
        kind: sum(number for (_, k), number in counts.counts.items() if k == kind) / passes
        for kind in ("triton", "torch", "to device", "to host")
    }
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    model = load_checkpoint(args.model, device=args.device)
    methods = dict(METHODS)
    if model.config.has_diffusion:
        methods["blt-d-8 a0.7"] = diffusion(DecodingMethod.BLT_D, 8, "a0.7")
    prompts = held_out_prompts(args.requests, 24)
    result = {}
    print("| method | part | runs a pass | Triton launches | torch launches | to device | to host |")
    print("|" + "---|" * 7)
    for name, decoding in methods.items():
        rows = result[name] = count(model, prompts, decoding, args.passes, args.device)
        for part, row in rows.items():
            figures = [f"{row.get(kind, 0.0):.2f}" for kind in ("calls", "triton", "torch", "to device", "to host")]
            print(f"| {name} | {part} | {' | '.join(figures)} |", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"passes": args.passes, "requests": args.requests, "methods": result}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
