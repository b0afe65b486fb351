"""Replays a recorded trace, or random arrivals, on the simulator with what passes cost on this machine.

    python -m fastblt.benchmarks.simulation.replay trace AzureLLMInferenceTrace_code.csv --rate 17.673
    python -m fastblt.benchmarks.simulation.replay hour

The curves are measured first, or read from `--costs FILE`, a result of `measure` written with `--json`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import begin, end, endless, start
from fastblt.benchmarks.load.arrivals import read_trace, scale_trace
from fastblt.benchmarks.load.workload import trace_jobs
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import library_prompts
from fastblt.benchmarks.simulation.runner import Machine
from fastblt.benchmarks.simulation.simulate import Job, percentile, simulate, simulated
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import encode, with_bos
from fastblt.server.engine.pass_time import PassTime, measure_costs
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import PRETRAINED

#: Requests that decode while the engine's own time is measured, and steps for each number.
_REQUESTS, _STEPS = (1, 32), 60


def measure(*, model: str = str(PRETRAINED)) -> dict[str, Any]:
    """What passes cost here, and what the engine's own work beside them takes."""
    blt = load_checkpoint(model)
    own: list[float] = []
    for count in _REQUESTS:
        engine = start(blt, count)
        engine.calibrate()
        names = begin(engine, library_prompts(count, 512), endless(DecodingParams(DecodingMethod.BLT), count))
        costs, per_depth = measure_costs(engine._runner, engine.max_model_len)
        seconds = []
        for _ in range(_STEPS):
            began = time.perf_counter()
            engine.step()
            took = time.perf_counter() - began
            seconds.append(took - sum(costs[name](rows) for name, rows in engine._runner.work))
        own.append(max(statistics.median(seconds), 0.0))
        per_byte = engine._scheduler.patches_per_byte()
        end(engine, names)
    per_request = max(own[1] - own[0], 0.0) / (_REQUESTS[1] - _REQUESTS[0])
    found = Machine(costs, per_depth, max(own[0] - per_request, 0.0), per_request, per_byte).as_dict()
    table = Table("", "")
    for name in ("per_depth", "per_step", "per_request", "patches_per_byte"):
        table.row(name, f"{found[name]:.3g}")
    return found


def trace(
    file: Path,
    *,
    rate: float | None = None,
    prompt_factor: float = 0.05,
    output_factor: float = 1.0,
    max_bytes: int = 4000,
    max_output: int = 1000,
    count: int = 300,
    first_byte: float = 1.0,
    per_byte: float = 0.05,
    costs: Path | None = None,
    max_gap_ms: float = 100.0,
    max_running: int = 64,
) -> dict[str, Any]:
    """Good requests of a trace: first byte within `first_byte` seconds, and `per_byte` seconds a byte after it."""
    scaled = scale_trace(
        read_trace(file, 0, count),
        rate=rate,
        prompt_factor=prompt_factor,
        output_factor=output_factor,
        max_prompt_bytes=max_bytes,
        max_output_bytes=max_output,
    )
    asked = trace_jobs(scaled, [{}], {}, 0)
    jobs = [
        Job(float(at), with_bos(encode(one.prompt.encode())), one.max_tokens)
        for at, one in zip(scaled.seconds, asked, strict=True)
    ]
    where = simulated(_machine(costs), max_gap_ms=max_gap_ms, max_running=max_running)
    began = time.perf_counter()
    seen = simulate(where, jobs)
    good = sum(one.first <= first_byte and one.per_byte <= per_byte for one in seen)
    return _shown(
        {
            "good": good / len(seen),
            "output_bytes_per_second": sum(job.output for job in jobs) / where.clock.now,
            "first_byte_p50_s": percentile([one.first for one in seen], 0.5),
            "first_byte_p95_s": percentile([one.first for one in seen], 0.95),
            "simulated_s": where.clock.now,
            "took_s": time.perf_counter() - began,
        }
    )


def hour(
    *, costs: Path | None = None, seconds: float = 3600.0, load: float = 0.9, longest: int = 20_000, seed: int = 0
) -> dict[str, Any]:
    """Random arrivals at `load` of what the machine can do with 300 requests at once. Each request's wait for its first
    byte, over the bound of 3 seconds and 30 times what its prompt takes alone."""
    rng, machine = random.Random(seed), _machine(costs)

    def job(at: float) -> Job:
        ids = [1, *rng.choices(range(4, 260), k=int(math.exp(rng.uniform(math.log(20), math.log(longest)))))]
        return Job(at, ids, rng.choice((1, 16, 64, 256)))

    rushed = simulated(machine)
    some = [job(0.0) for _ in range(300)]
    simulate(rushed, some)
    gap = rushed.clock.now / len(some) / load
    jobs, at = [], 0.0
    while (at := at + rng.expovariate(1 / gap)) < seconds:
        jobs.append(job(at))
    where = simulated(machine)
    began = time.perf_counter()
    seen = simulate(where, jobs)
    pass_time = PassTime(machine.curves, machine.per_depth, 0.1)
    alone = [pass_time.prompt_seconds(len(one.job.ids), machine.patches_per_byte) for one in seen]
    shares = [one.first / (3.0 + 30 * own) for one, own in zip(seen, alone, strict=True)]
    return _shown(
        {
            "load": load,
            "requests": len(seen),
            "longest_wait_over_bound": max(shares),
            "first_byte_max_s": max(one.first for one in seen),
            "first_byte_p99_s": percentile([one.first for one in seen], 0.99),
            "first_byte_p50_s": percentile([one.first for one in seen], 0.5),
            "longest_over_own": max(one.first / own for one, own in zip(seen, alone, strict=True)),
            "turns": where.engine.stats().turns,
            "preemptions": where.engine.stats().preemptions,
            "took_s": time.perf_counter() - began,
            "passed": max(shares) <= 1.0,
        }
    )


def _machine(costs: Path | None) -> Machine:
    return Machine.of(json.loads(costs.read_text()) if costs is not None else measure())


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    table = Table("figure", "")
    for name, value in found.items():
        table.row(name, f"{value:.4g}")
    return found


app = command(measure, trace, hour)

if __name__ == "__main__":
    app()
