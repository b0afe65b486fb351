"""Before a pass: plans for the sequences that have none, their pages, and the entropy model and encoder over them."""

from __future__ import annotations

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.context import EngineContext
from fastblt.server.engine.pass_time import PromptBudget
from fastblt.server.engine.prompts import Leaders, divide
from fastblt.server.engine.room import Room
from fastblt.server.engine.sequence import Patch, Planned, Sequence

#: Most bytes of one fused call where patches have no maximum length.
_MOST_STEPS = 16

#: The part of a pass that prompts may take which come in the middle of a beat: one of so many.
_JOINING = 4


class Planner:
    """Makes the plans of running sequences, and the passes of the small modules that they need first."""

    def __init__(self, context: EngineContext) -> None:
        config, settings, runner = context.config, context.settings, context.runner
        self._context = context
        self._scheduler = context.scheduler
        self._runner = runner
        #: What the last plans have of prompts.
        self.prompts = PromptBudget(0)
        #: How many requests were past their prompts when the last plans were made.
        self.decoding = 0
        self._rule = context.rule
        #: Whether the decoder's rows begin as the encoder's states (else as embeddings).
        self._encoder_input = config.decoder_input == "encoder"
        #: Most rows of a fused call whose bytes stay (they end with their patch), and most rows or steps of a draft or
        #: a block. 1 where requests must not wait for each other.
        most = settings.max_passes_per_beat if runner.fused_steps is not None and settings.max_hold_ms != 0 else 1
        self._most_steps = (min(most, config.max_patch_length or _MOST_STEPS), most)

    def plan(self) -> list[Planned]:
        """Give a plan and its pages to the running sequences that have none. Returns the new plans.

        Decoding requests go on, each as its method says. Prompts share what these leave of the pass.
        """
        planned: list[Planned] = []
        prompts: list[Sequence] = []
        self.decoding = sum(not sequence.prefilling for sequence in self._scheduler.running)
        for sequence in list(self._scheduler.running):
            if sequence.plan is not None or sequence.state_index == 0:
                continue
            if sequence.prefilling:
                prompts.append(sequence)
            elif not sequence.undecided:
                self._plan_next(sequence, planned)
        prompts = [sequence for sequence in prompts if sequence.state_index]
        for sequence, rows in self._divide(prompts).items():
            if sequence.state_index == 0:
                continue
            known, decoded = len(sequence.ids), sequence.decoded
            sequence.prefilling = rows < known - decoded
            if not sequence.prefilling:
                self._plan_next(sequence, planned)
            elif self._scheduler.reserve(sequence, plan := Plan(decoded, rows)):
                sequence.plan = plan
                planned.append((sequence, plan))
        # A later sequence may have preempted an earlier one to get its pages.
        return [(sequence, plan) for sequence, plan in planned if sequence.plan is plan]

    def held(self) -> list[Sequence]:
        """Requests with rows of their prompts planned that wait for the next upstream pass."""
        return [s for s in self._scheduler.running if s.plan is not None and s.decoded < s.prompt_length - 1]

    def _plan_next(self, sequence: Sequence, planned: list[Planned]) -> None:
        """The plan that a sequence's method wants next."""
        plan = sequence.method.plan(len(sequence.ids), sequence.decoded, sequence.left)
        if plan.repeat > 1:
            own = plan.draft or bool(plan.block_ids or plan.next_length)
            plan.stop_after(self._most_steps[own] if sequence.fusable else 1)
        if self._scheduler.reserve(sequence, plan):
            sequence.plan = plan
            planned.append((sequence, plan))

    def _divide(self, prompts: list[Sequence]) -> dict[Sequence, int]:
        """The rows of each prompt in this pass."""
        self.prompts = PromptBudget(0)
        if not prompts:
            return {}
        scheduler, pass_time, held = self._scheduler, self._context.pass_time, self.held()
        rows, seconds = scheduler.prompt_rows(), 0.0
        if pass_time is not None:
            seconds = pass_time.allowed(decoding=self.decoding > 0)
        if held:
            # Some have their rows, and wait for the end of the beat. Only what is short may join them: its first
            # upstream pass ends the beat, and takes them along.
            rows, seconds = max(rows // _JOINING, 1), seconds / _JOINING
        budget = PromptBudget(rows, pass_time, seconds, scheduler.patches_per_byte())
        if held:
            prompts = [s for s in prompts if budget.fit(s.decoded, s.known - s.decoded) == s.known - s.decoded]
        room = Room(self._context.caches, self.decoding, scheduler.eldest())
        worth = pass_time.worth_waiting() if pass_time is not None else 1
        enabled, page = self._context.prefix.enabled, self._context.caches.page_size
        leaders = Leaders(page, worth, held) if enabled else None
        divided = divide(prompts, budget, leaders, room=room.rows, join=scheduler.join)
        self.prompts = budget
        return divided

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
