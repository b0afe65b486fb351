"""BLT-DV: block diffusion drafts, the causal pass of the same weights verifies (arXiv 2605.08044 §5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastblt.models.vocabulary import MASK_ID
from fastblt.server.decoding.blt_s import finish_round, verify
from fastblt.server.decoding.method import Outcome, Plan, Progress, Unmask, fixed_by


class BltDV:
    """Drafts a block and verifies it as BLT-S does.

    The draft's first pass has a causal row for the newest byte, whose own byte opens the draft at no extra cost, and a
    block of masks behind it. `begun`: the request has had its first pass, which drafts nothing.
    """

    def __init__(
        self,
        block_size: int,
        unmask: Unmask,
        max_steps: int | None,
        paper_accounting: bool = False,
        *,
        begun: bool = False,
    ) -> None:
        self._paper = paper_accounting
        self._size = block_size
        self._unmask = unmask
        self._max_steps = max_steps
        self._block: Sequence[int] = ()
        self._steps = 0
        #: The step, from 1, that filled each position of the block; 0 where none has.
        self._fixed: list[int] = []
        self._drafted = False
        self._begun = begun

    def plan(self, known: int, computed: int, left: int) -> Plan:
        step = self._unmask
        if self._max_steps is not None:
            # A verification goes on with the next draft, which begins to count anew.
            step = replace(step, left=self._max_steps - (0 if self._drafted else self._steps))
        # Every step fills a position at least.
        repeat = 1 if step.fills else self._size
        if self._drafted:
            plan = verify(self._block, known, computed, paper=self._paper)
            if not self._paper:
                plan.draft_next(self._size, step, repeat)
            return plan
        if self._block:
            return Plan(
                known,
                0,
                upstream=False,
                draft=True,
                block_ids=self._block,
                provisional=self._paper,
                unmask=step,
                scan_to=known + len(self._block),
                repeat=repeat,
            )
        # The verification gives a byte of its own, so the last one is never drafted.
        size = self._size if self._paper else min(self._size, left - 1)
        if not self._begun or size <= 0:
            return verify((), known, computed)
        block = [MASK_ID] * size
        return Plan(
            computed,
            1,
            upstream=self._paper,
            draft=True,
            samples=1,
            block_ids=block,
            provisional=self._paper,
            unmask=step,
            scan_to=known + size,
            repeat=repeat,
        )

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.draft:
            draft, fixed = self._block, self._fixed
            self.reset()
            self._begun = True
            return finish_round(draft, plan, outcome, fixed)
        if outcome.block_steps:
            self._fixed = fixed_by(self._fixed, outcome.block_steps, self._steps)
        self._steps += outcome.steps
        self._block = outcome.block_ids
        self._drafted = outcome.block_done
        return Progress(draft=self._block if self._drafted else (), steps=outcome.steps)

    def reset(self) -> None:
        self._block = ()
        self._steps = 0
        self._fixed = []
        self._drafted = False
        self._begun = False
