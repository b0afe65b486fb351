"""Stands in for the model: passes take virtual time by cost curves, patches close at random places, bytes are any.

Scheduler, planner, caches' page tables and prefix cache above it are those of a real engine.
"""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Sequence as Numbers
from dataclasses import dataclass, field
from typing import Any

from fastblt.models.blt import Blt
from fastblt.models.patching import PatchRule
from fastblt.models.vocabulary import BYTE_OFFSET
from fastblt.server.decoding.method import Plan
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.device.cost import MODULES, STEP, CostCurve, Costs
from fastblt.server.engine.runner.model_runner import ModelRunner
from fastblt.server.engine.runner.samples import Result
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.request import Ledger
from fastblt.server.settings import EngineSettings

#: Above every threshold, and below: nats.
_HIGH, _LOW = 1e9, -1e9


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """What a machine and a model take, in seconds.

    `curves` are passes of the modules by rows, and of one fused step (`STEP`) by requests. `per_depth` is what a row of
    the global transformer takes more for every patch before it, `per_step` and `per_request` what the engine's own work
    takes. `patches_per_byte` is a property of the texts.
    """

    curves: Costs
    per_depth: float = 0.0
    per_step: float = 0.0
    per_request: float = 0.0
    patches_per_byte: float = 0.22

    @classmethod
    def linear(cls, fixed: float, per_row: float, per_patch: float, per_byte: float, **others: float) -> Machine:
        """A pass of any module takes `fixed` seconds, a prompt's byte `per_row` in all, a patch `per_patch`, and a
        fused step `fixed` and `per_byte` for every request."""
        rows = (1, 256)

        def curve(each: float) -> CostCurve:
            return CostCurve(rows, tuple(fixed + each * count for count in rows))

        curves = {name: curve(per_row / 3) for name in MODULES} | {"global": curve(per_patch), STEP: curve(per_byte)}
        return cls(curves, **others)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        numbers = {name: value for name, value in vars(self).items() if name != "curves"}
        return numbers | {"curves": {name: [curve.rows, curve.seconds] for name, curve in self.curves.items()}}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Machine:
        """From `as_dict`."""
        curves = {name: CostCurve(tuple(rows), tuple(seconds)) for name, (rows, seconds) in found["curves"].items()}
        numbers = {name: found[name] for name in ("per_depth", "per_step", "per_request", "patches_per_byte")}
        return cls(curves, **numbers)


@dataclass
class SimulatedRunner(ModelRunner):
    """A runner of BLT whose passes move `clock` on. Plans of one row go on to the end of their patch, as on a CPU."""

    machine: Machine
    clock: Clock
    caches: KvCaches
    rule: PatchRule
    seed: int = 0
    #: Whatever is true: several rows go in one call.
    fused_steps: Any = True
    ledger: Ledger = field(default_factory=Ledger)
    work: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        share = self.machine.patches_per_byte
        length = self.caches.max_length + 64
        #: All texts end their patches at the same places, so that equal texts do.
        self._entropies = [_HIGH if rng.random() < share else _LOW for _ in range(length)]

    @classmethod
    def maker(cls, machine: Machine, clock: Clock) -> abc.Callable[[Blt, KvCaches, EngineSettings], SimulatedRunner]:
        """What an engine makes its runner with."""

        def make(model: Blt, caches: KvCaches, settings: EngineSettings) -> SimulatedRunner:
            patching = model.config.with_patching(settings.patching_threshold, settings.max_patch_length)
            rule = PatchRule(patching.patching_threshold, patching.max_patch_length)
            return cls(machine, clock, caches, rule)

        return make

    def costs(self, context: int, patches: int, counts: tuple[int, ...]) -> Costs:
        deep = {"global": self.machine.per_depth * patches}
        return {
            name: CostCurve(counts, tuple(curve(n) + deep.get(name, 0.0) * n for n in counts))
            for name, curve in self.machine.curves.items()
        }

    def begin_step(self) -> None:
        """No pass waits."""

    def admit(self, sequence: Sequence) -> None:
        self.clock.now += self.machine.per_request

    def commit(self, sequence: Sequence, ids: Numbers[int]) -> None:
        pass

    def scan(self, sequences: list[Sequence], until: list[int]) -> list[list[float]]:
        found = [self._entropies[s.scanned : end] for s, end in zip(sequences, until, strict=True)]
        self._pass("patcher", sum(map(len, found)))
        self.ledger.patcher += 1
        return found

    def encode(self, sequences: list[Sequence], until: list[int]) -> None:
        rows = 0
        for sequence, end in zip(sequences, until, strict=True):
            rows += end - sequence.encoded
            sequence.encoded = end
        self._pass("encoder", rows)
        self.ledger.encoder += 1

    def upstream(self, sequences: list[Sequence]) -> None:
        rows, depth = 0, 0
        for sequence in sequences:
            for patch in sequence.pending_patches():
                patch.slot = self.caches.latent_pool.take()
                rows += 1
                depth += patch.index
            sequence.ledger.global_ += 1
        self._pass("global", rows)
        self.clock.now += self.machine.per_depth * depth
        self.ledger.global_ += 1

    def decode(self, planned: list[Planned]) -> list[Result]:
        results: list[Result] = []
        rows, steps = 0, [0]
        for sequence, plan in planned:
            sequence.ledger.decoder += 1
            if plan.causal == 1 and plan.samples == 1 and sequence.fusable:
                result, made = self._rows(sequence, plan)
                steps.append(made)
            else:
                rows += plan.rows
                result = Result([_byte(plan.end)] * plan.samples)
            results.append(result)
        if rows:
            self._pass("decoder", rows)
        for step in range(max(steps)):
            self._pass(STEP, sum(made > step for made in steps))
        self.ledger.decoder += max(steps) + (rows > 0)
        self.clock.now += self.machine.per_step + self.machine.per_request * len(planned)
        return results

    def _rows(self, sequence: Sequence, plan: Plan) -> tuple[Result, int]:
        """Rows of BLT up to the end of a patch, of the text, or of the plan."""
        entropies, left = self._entropies, sequence.left
        ids: list[int] = []
        scanned: list[float] = []
        longest, threshold = self.rule.max_patch_length, self.rule.threshold
        for at in range(plan.start + 1, plan.start + 1 + plan.repeat):
            ids.append(_byte(at))
            if len(ids) == left:
                break
            scanned.append(entropies[at])
            if entropies[at] > threshold or at - sequence.open_start + 1 == longest:
                break
        result = Result(ids, extra_rows=len(ids) - 1)
        result.entropies = scanned
        sequence.encoded = plan.start + len(ids)
        return result, len(ids)

    def _pass(self, kind: str, rows: int) -> None:
        self.clock.now += self.machine.curves[kind](rows)
        self.work.append((kind, rows))


def _byte(position: int) -> int:
    return BYTE_OFFSET + position % 200
