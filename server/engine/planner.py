"""Before a pass: plans for the sequences that have none, their pages, and the entropy model and encoder over them."""

from __future__ import annotations

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.context import EngineContext
from fastblt.server.engine.sequence import Patch, Planned

#: Most bytes of one fused call where patches have no maximum length.
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
        #: Most rows of a fused call whose bytes stay (they end with their patch), and most rows or steps of a draft or
        #: a block. 1 where requests must not wait for each other.
        most = settings.max_passes_per_beat if runner.fused_steps is not None and settings.max_hold_ms != 0 else 1
        self._most_steps = (min(most, config.max_patch_length or _MOST_STEPS), most)

    def plan(self) -> list[Planned]:
        """Give a plan and its pages to every running sequence that has none. Returns the new plans."""
        scheduler = self._scheduler
        planned: list[Planned] = []
        budget: int | None = None
        for sequence in list(scheduler.running):
            if sequence.plan is not None or sequence.state_index == 0:
                continue
            if sequence.undecided and not sequence.prefilling:
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
        # A later sequence may have preempted an earlier one to get its pages.
        return [(sequence, plan) for sequence, plan in planned if sequence.plan is plan]

    def prepare(self, planned: list[Planned]) -> None:
        """Run entropy model and encoder as far as the new plans need; mark those ready that need no upstream pass."""
        scan: list[Planned] = []
        encode: list[Planned] = []
        # Rows of a draft are encoded where the decoder reads encoder states. Fused steps do that themselves.
        encoder_input, fuses = self._encoder_input, self._runner.fuses
        for sequence, plan in planned:
            if plan.upstream and plan.end > sequence.scanned:
                scan.append((sequence, plan))
            if plan.end > sequence.encoded and (plan.upstream or (encoder_input and not fuses(sequence, plan))):
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
