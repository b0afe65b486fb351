"""Before a pass: a plan for everyone who has none, with its pages, and what the small modules must do for it first."""

from __future__ import annotations

from fastblt.models.config import BltConfig
from fastblt.models.patching import PatchRule
from fastblt.server.decoding.method import Plan
from fastblt.server.engine.runner.model_runner import ModelRunner
from fastblt.server.engine.scheduler import Scheduler
from fastblt.server.engine.sequence import Patch, Sequence
from fastblt.server.settings import EngineSettings

#: How many bytes may follow each other in one call where patches have no longest.
_MOST_STEPS = 16


class Planner:
    """Plans for the engine, whose scheduler and runner it is given; `rule` closes patches."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, rule: PatchRule, config: BltConfig, settings: EngineSettings
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._rule = rule
        self._encoder_input = config.decoder_input == "encoder"
        #: How many rows a plan that keeps their bytes may go on for, and how many rows or steps another: nobody waits
        #: longer than asked.
        most = settings.max_passes_per_beat if runner.fused_steps is not None and settings.max_hold_ms != 0 else 1
        self._most_steps = (min(most, config.max_patch_length or _MOST_STEPS), most)

    def plan(self) -> list[Sequence]:
        """Give a plan, with pages, to every running sequence that has none; those that got one."""
        scheduler = self._scheduler
        planned: list[Sequence] = []
        budget: int | None = None
        for sequence in list(scheduler.running):
            if sequence.plan is not None or sequence.state_index == 0:
                continue
            known, decoded = len(sequence.ids), sequence.decoded
            if sequence.prefilling:
                budget = scheduler.prefill_budget() if budget is None else budget
                if budget == 0:
                    continue
                chunk = min(known - decoded, budget)
                budget -= chunk
                sequence.prefilling = chunk < known - decoded
                if sequence.prefilling:
                    plan = Plan(decoded, chunk)
            if not sequence.prefilling:
                plan = sequence.method.plan(known, decoded, sequence.left)
                if plan.repeat > 1:
                    own = plan.draft or bool(plan.block_ids or plan.next_length)
                    most = self._most_steps[own] if sequence.fusable else 1
                    plan.stop_after(most)
            if scheduler.reserve(sequence, plan):
                sequence.plan = plan
                planned.append(sequence)
        # A sequence planned early may have been preempted for a later one.
        return [s for s in planned if s.plan is not None]

    def prepare(self, sequences: list[Sequence]) -> None:
        """Entropy model and encoder over the bytes that the new plans need; then it is known who needs upstream."""
        scan, encode = [], []
        # A draft's rows are encoded because the decoder reads their states: by its own call, where that can.
        encoder_input, fused_steps = self._encoder_input, self._runner.fused_steps is not None
        for sequence in sequences:
            plan = sequence.plan
            assert plan is not None
            if plan.upstream and plan.end > sequence.scanned:
                scan.append(sequence)
            if plan.end > sequence.encoded and (
                plan.upstream or (encoder_input and not (fused_steps and sequence.fusable))
            ):
                encode.append(sequence)
        if scan:
            ends = [s.plan.end for s in scan if s.plan is not None]
            for sequence, entropy in zip(scan, self._runner.scan(scan, ends), strict=True):
                sequence.take_entropies(entropy, self._rule)
        if encode:
            self._runner.encode(encode, [s.plan.end for s in encode if s.plan is not None])
        for sequence in sequences:
            plan = sequence.plan
            assert plan is not None
            if not plan.upstream:
                sequence.ready = True
                continue
            if sequence.open_start < plan.end:
                if plan.if_open is not None:
                    plan = sequence.plan = plan.if_open
                if plan.provisional:
                    self._scheduler.drop_provisional(sequence)
                    sequence.provisional = Patch(sequence.closed, sequence.open_start, plan.end - 1)
            sequence.ready = not sequence.pending
