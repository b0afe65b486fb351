"""Runs settings over the same prompts in turns, and records outputs, passes, and measured and predicted seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fastblt.benchmarks.harness import Output, complete, start, whole_length
from fastblt.benchmarks.savings.cost_curve import CostCurve
from fastblt.benchmarks.savings.passes import Pass, Recorder
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.server.engine.engine import Engine
from fastblt.server.request import MAX_BLOCK_SIZE, SamplingParams


@dataclass
class Batch:
    """The outputs of requests that ran together, in order. All other fields are about the time after the prompts' pass.

    `predicted`: seconds of the passes by a cost curve. `drift`: by module, the time of a pass at the time of this run,
    relative to the time when the curve was measured. `drafted` and `accepted`: bytes by their position in a draft.
    """

    outputs: list[Output]
    seconds: float
    bytes: int
    passes: list[Pass]
    predicted: float
    drift: dict[str, float]
    drafted: list[int]
    accepted: list[int]

    def join(self, other: Batch) -> Batch:
        """This batch and `other`, as one that took the time of both."""
        share = self.seconds / (self.seconds + other.seconds)
        return Batch(
            self.outputs + other.outputs,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.passes + other.passes,
            self.predicted + other.predicted,
            {name: share * value + (1 - share) * other.drift[name] for name, value in self.drift.items()},
            _sums(self.drafted, other.drafted),
            _sums(self.accepted, other.accepted),
        )


def engine_of(model: Blt, prompts: Sequence[list[int]], length: int, threads: int | None = None) -> Engine:
    """An engine that runs all prompts at once, computes them in one pass, and has no prefix cache."""
    longest = max(map(len, prompts)) + MAX_BLOCK_SIZE
    return start(
        model,
        len(prompts),
        max_pass_rows=max(512, len(prompts) * longest),
        max_model_len=longest + length + 4096,
        # A minute, which no pass takes: prompts are not cut for the sake of bytes that are under way.
        max_gap_ms=60_000,
        prefix_cache=False,
        threads=threads,
    )


class Course:
    """Runs settings on one engine in turns, and corrects the cost curve for the machine's current speed."""

    def __init__(self, engine: Engine, curve: CostCurve) -> None:
        self._engine = engine
        self._curve = curve
        self.recorder = Recorder(engine)

    def round(
        self,
        settings: Sequence[str],
        prompts: Sequence[list[int]],
        length: int,
        temperature: float = 0.0,
        together: int | None = None,
    ) -> dict[str, Batch]:
        """Decode `length` bytes for every prompt by every setting, `together` prompts at a time. A prompt's number is
        its seed.

        The machine's speed may drift. So settings take turns on each batch of prompts, and a few passes are timed
        before and after each run, to correct the curve for the speed at that time.
        """
        done: dict[str, Batch] = {}
        size = together or len(prompts)
        early = self._curve.drift(self._engine)
        for first in range(0, len(prompts), size):
            seeds = range(len(prompts))[first : first + size]
            for name in settings:
                params = [whole_length(decoding(name), length, temperature, seed) for seed in seeds]
                part = self._run(prompts[first : first + size], params)
                late = self._curve.drift(self._engine)
                part.drift = {module: (early[module] + late[module]) / 2 for module in early}
                part.predicted = sum(self._curve.predict(one) * part.drift[one.module] for one in part.passes)
                done[name] = done[name].join(part) if name in done else part
                early = late
        return done

    def _run(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Batch:
        clock, begun, before = 0.0, 0, self._engine.stats()

        def after_step(outputs: list[Output]) -> None:
            nonlocal clock, begun
            if not clock:
                # The first step is the prompts' pass. The clock starts after it.
                begun = sum(len(output.ids) for output in outputs)
                self.recorder.clear()
                clock = time.perf_counter()

        with self.recorder.on():
            outputs = complete(self._engine, prompts, params, after_step=after_step)
        seconds, after = time.perf_counter() - clock, self._engine.stats()
        made = sum(len(output.ids) for output in outputs) - begun
        if not made:
            raise ValueError("all bytes came with the prompts' pass, so nothing can be timed; ask for longer outputs")
        drafted, accepted = (
            _sums(getattr(after, name), [-count for count in getattr(before, name)])
            for name in ("drafted_by_position", "accepted_by_position")
        )
        return Batch(outputs, seconds, made, self.recorder.take(), 0.0, {}, drafted, accepted)


def module_seconds(batch: Batch) -> Mapping[str, float]:
    """Seconds of a batch's passes by module."""
    return {name: sum(done.seconds for done in batch.passes if done.module == name) for name in batch.drift}


def engine_seconds(batch: Batch) -> float:
    """Seconds for each decoder pass of a batch that no pass has: selection, scheduling, Python."""
    outside = batch.seconds - sum(done.seconds for done in batch.passes)
    return outside / sum(done.module == "decode" for done in batch.passes)


def predicted(batch: Batch, other: Batch) -> float:
    """Seconds of a batch by its passes, and by the engine's time beside those of another batch."""
    return batch.predicted + engine_seconds(other) * sum(done.module == "decode" for done in batch.passes)


def _sums(*counts: Sequence[int]) -> list[int]:
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]
