"""Before a pass: a plan for everyone who has none, with its pages, and what the small modules must do for it first."""

from __future__ import annotations

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.context import EngineContext
from fastblt.server.engine.sequence import Patch, Planned

#: How many bytes may follow each other in one call where patches have no longest.
_MOST_STEPS = 16


class Planner:
    """Makes the plans of running sequences, and the passes of the small modules that they need first."""

    def __init__(self, context: EngineContext) -> None:
        config, settings, runner = context.config, context.settings, context.runner
        self._scheduler = context.scheduler
        self._runner = runner
        self._rule = context.rule
        #: Whether the decoder's rows begin as the encoder's states (else as embeddings).
        self._encoder_input = config.decoder_input == "encoder"
        #: How many rows a plan that keeps their bytes may go on for, and how many rows or steps another: nobody waits
        #: longer than asked.
        most = settings.max_passes_per_beat if runner.fused_steps is not None and settings.max_hold_ms != 0 else 1
        self._most_steps = (min(most, config.max_patch_length or _MOST_STEPS), most)

    def plan(self) -> list[Planned]:
        """Give a plan, with pages, to every running sequence that has none; those that got one."""
        scheduler = self._scheduler
        planned: list[Planned] = []
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
                planned.append((sequence, plan))
        # A sequence planned early may have been preempted for a later one.
        return [(sequence, plan) for sequence, plan in planned if sequence.plan is plan]

    def prepare(self, planned: list[Planned]) -> None:
        """Entropy model and encoder over the bytes that the new plans need; then it is known who needs upstream."""
        scan: list[Planned] = []
        encode: list[Planned] = []
        # A draft's rows are encoded because the decoder reads their states: by its own call, where that can.
        encoder_input, fused_steps = self._encoder_input, self._runner.fused_steps is not None
        for sequence, plan in planned:
            if plan.upstream and plan.end > sequence.scanned:
                scan.append((sequence, plan))
            if plan.end > sequence.encoded and (
                plan.upstream or (encoder_input and not (fused_steps and sequence.fusable))
            ):
                encode.append((sequence, plan))
        if scan:
            entropies = self._runner.scan([sequence for sequence, _ in scan], [plan.end for _, plan in scan])
            for (sequence, _), entropy in zip(scan, entropies, strict=True):
                sequence.take_entropies(entropy, self._rule)
        if encode:
            self._runner.encode([sequence for sequence, _ in encode], [plan.end for _, plan in encode])
        for sequence, plan in planned:
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
