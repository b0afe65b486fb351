"""An engine's first contact with a device: right, how fast beside the prediction, where time and memory go.

    python -m fastblt.benchmarks.gpu.contact --device cuda --shape 1b

Every part prints its result at once and fails alone.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import complete, replaced, start, whole_length
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import paper_shape, widen
from fastblt.server.engine.device.cuda_graphs import CudaGraphs
from fastblt.server.engine.device.devices import device_of, dtype_of
from fastblt.server.engine.engine import Engine
from fastblt.server.settings import PRETRAINED

METHODS = ("blt", "blt-s k16", "blt-dv-8 1step", "blt-dsv-8 k32", "blt-d-8 a0.7")


class Contact:
    """The parts. `length` bytes are made of each of the prompts."""

    def __init__(self, model: Blt, device: torch.device, length: int) -> None:
        self.model, self.device, self.length = model, device, length
        self.prompts = held_out_prompts(32, 256 if length > 32 else 24)

    def engine(self, requests: int, **settings: Any) -> Engine:
        memory = None if self.device.type == "cuda" else 128 << 20
        return start(self.model, requests, **({"max_model_len": 2048, "cache_bytes": memory} | settings))

    def run(self, engine: Engine, setting: str, count: int, *, seed: int = 0) -> tuple[list[list[int]], float]:
        """The ids of `count` requests, and bytes a second of all of it."""
        params = [whole_length(decoding(setting), self.length, seed=seed + at) for at in range(count)]
        began = time.perf_counter()
        outputs = complete(engine, self.prompts[:count], params)
        return [output.ids for output in outputs], count * self.length / (time.perf_counter() - began)

    def methods(self) -> dict[str, Any]:
        """One request: cold and warm, twice the same, and BLT's bytes where that is promised."""
        rows: dict[str, Any] = {}
        plain: list[list[int]] = []
        for name in METHODS:
            engine = self.engine(1, deterministic=True)
            first, cold = self.run(engine, name, 1)
            again, warm = self.run(engine, name, 1)
            plain = plain or first
            rows[name] = {"cold bytes/s": cold, "warm bytes/s": warm, "twice the same": first == again}
            rows[name]["differs from blt at"] = next(
                (at for at, (one, other) in enumerate(zip(first[0], plain[0], strict=False)) if one != other), None
            )
        return rows

    def batches(self) -> dict[str, Any]:
        """Bytes a second by the number of requests."""
        rows: dict[str, Any] = {}
        for count in (1, 8, 32) if self.length > 32 else (1, 2):
            engine = self.engine(count, prefix_cache=False)
            for name in METHODS:
                self.run(engine, name, count)
                rows[f"{name} x{count}"] = round(self.run(engine, name, count)[1], 1)
        return rows

    def alone(self) -> dict[str, bool]:
        """Deterministic: alone = batched, and a prefix hit = a miss."""
        count = 4
        engine = self.engine(count, deterministic=True)
        together, _ = self.run(engine, "blt-s k16", count)
        single = [self.run(self.engine(1, deterministic=True), "blt", count)[0]]
        return {"alone = batched": single[0] == together, "hit = miss": self.run(engine, "blt", count)[0] == together}

    def graphs(self) -> dict[str, Any]:
        """Captured = eager; how many graphs there are, and the memory they took."""
        engine = self.engine(2, deterministic=True)
        captured, _ = self.run(engine, "blt-s k16", 2)
        uncaptured = (CudaGraphs, "run", lambda _: lambda graphs, key, function: function())
        with replaced(uncaptured):
            eager, _ = self.run(self.engine(2, deterministic=True), "blt-s k16", 2)
        return {"captured = eager": captured == eager, "graphs": len(engine._runner._passes or ()), **self.memory()}

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        return {"reserved GB": torch.cuda.memory_reserved(self.device) / 1e9, "free GB": free / 1e9, "GB": total / 1e9}

    def auto(self) -> dict[str, Any]:
        """The curves that `auto` measures in a cold process, and the draft that it would take."""
        engine = self.engine(8)
        engine.calibrate()
        controller = engine._context.controller
        assert controller is not None
        milliseconds = {name: [round(1e3 * s, 3) for s in curve.seconds] for name, curve in controller._costs.items()}
        return {"best": str(controller.best), "milliseconds": milliseconds}

    def profile(self) -> dict[str, Any]:
        """Where a byte's time goes."""
        if self.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        engine = self.engine(1)
        self.run(engine, "blt-s k16", 1)
        with profile(activities=[ProfilerActivity.CUDA]) as done:
            _, rate = self.run(engine, "blt-s k16", 1)
            torch.cuda.synchronize(self.device)
        each = sorted(done.key_averages(), key=lambda one: -one.self_device_time_total)
        top = {one.key[:60]: round(one.self_device_time_total / 1e3, 2) for one in each[:10]}
        busy = sum(one.self_device_time_total for one in each) / 1e6
        kernels = sum(one.count for one in each) / self.length
        return {"kernels a byte": kernels, "busy": busy * rate / self.length, "milliseconds": top}

    def server(self) -> dict[str, Any]:
        """A server of its own, and one completion by each method."""
        from fastblt.server.llm import LLM
        from fastblt.server.request import SamplingParams

        llm = LLM(device=str(self.device), max_running=4, max_model_len=1024)
        found = {}
        for name in METHODS:
            params = SamplingParams(max_tokens=self.length, temperature=0.0, decoding=decoding(name))
            found[name] = llm.generate("while True:\n", params)[0].text[:40]
        return found


PARTS = ("methods", "graphs", "alone", "batches", "profile", "auto", "server")


def measure(
    *,
    device: str = "cuda",
    dtype: str | None = None,
    shape: str = "none",
    only: Sequence[str] = PARTS[:5],
    quick: bool = False,
) -> dict[str, Any]:
    """Run the parts."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    there = device_of(device)
    began = time.perf_counter()
    model = load_checkpoint(str(PRETRAINED), dtype=dtype_of(dtype, there), device=str(there))
    if shape != "none":
        model = widen(model, paper_shape(shape, patcher=True))
    contact = Contact(model, there, 24 if quick else 128)
    result: dict[str, Any] = {"load": {"seconds": round(time.perf_counter() - began, 1), "shape": shape}}
    failed = False
    for name in only:
        clock = time.perf_counter()
        call: Callable[[], Any] = getattr(contact, name)
        try:
            result[name] = call()
        except Exception as error:
            traceback.print_exc()
            result[name], failed = f"FAILED {type(error).__name__}: {error}", True
        print(f"{name} ({time.perf_counter() - clock:.1f} s): {result[name]}", flush=True)
    return result | {"passed": not failed}


app = command(measure)

if __name__ == "__main__":
    app()
