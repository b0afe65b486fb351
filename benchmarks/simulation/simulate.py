"""Runs an engine on virtual time: traces of hours in seconds, with the scheduler that serves.

machine = Machine.linear(fixed=1e-3, per_row=8e-5, per_patch=1e-4, per_byte=2e-4)
seen = simulate(engine(machine), [Job(0.0, prompt_ids, 100), ...])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastblt.benchmarks.simulation.runner import Clock, Machine, SimulatedRunner
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import read_config
from fastblt.models.config import BltConfig
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings


@dataclass
class Job:
    """A request that comes at `at` seconds with these prompt ids, for `output` bytes."""

    at: float
    ids: list[int]
    output: int
    priority: int = 0
    salt: str | None = None


@dataclass
class Seen:
    """What its client saw: seconds after the start at which bytes came, one entry for each delta, and how many."""

    job: Job
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    end: float = 0.0

    @property
    def first(self) -> float:
        """Seconds from arrival to the first byte."""
        return self.times[0] - self.job.at

    @property
    def per_byte(self) -> float:
        """Mean seconds a byte after the first delta; 0 where that had all."""
        after = sum(self.counts[1:])
        return (self.times[-1] - self.times[0]) / after if after else 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between deltas."""
        return [later - one for one, later in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Simulated:
    """An engine and its clock."""

    engine: Engine
    clock: Clock


def simulated(machine: Machine, config: BltConfig | None = None, **settings: object) -> Simulated:
    """An engine without weights, by default of the shipped checkpoint's shape. `settings` are those of the engine."""
    clock = Clock()
    with torch.device("meta"):
        model = Blt(config or read_config(Path(PRETRAINED)))
    chosen = {"cache_bytes": 3 << 30, "decoding": DecodingParams(DecodingMethod.BLT)} | settings
    runner = SimulatedRunner.maker(machine, clock)
    engine = Engine(model, EngineSettings(**chosen), runner=runner, clock=clock)  # type: ignore[arg-type]
    engine.calibrate()
    return Simulated(engine, clock)


def simulate(where: Simulated, jobs: Iterable[Job], until: float = float("inf")) -> list[Seen]:
    """Run jobs, ordered by their times, to their ends, or up to `until` seconds; what every one of them saw."""
    engine, clock = where.engine, where.clock
    seen: dict[str, Seen] = {}
    coming = iter(jobs)
    job = next(coming, None)
    while (job is not None or engine.has_work()) and clock.now < until:
        if not engine.has_work() and job is not None:
            clock.now = max(clock.now, job.at)
        while job is not None and job.at <= clock.now:
            name = str(len(seen))
            seen[name] = Seen(job)
            engine.add(_request(name, job))
            job = next(coming, None)
        for delta in engine.step():
            one = seen[delta.request_id]
            if delta.ids:
                one.times.append(clock.now)
                one.counts.append(len(delta.ids))
            if delta.finish_reason is not None:
                one.end = clock.now
    return list(seen.values())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(-(-int(share * 1000) * len(values) // 1000) - 1, 0)]


def _request(name: str, job: Job) -> Request:
    params = SamplingParams(max_tokens=job.output, temperature=0.0, seed=0, ignore_eos=True)
    return Request(name, job.ids, params, job.at, priority=job.priority, cache_salt=job.salt)
