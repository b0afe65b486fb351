"""BLT-DSV: a diffusion block drafts, the decoder filters, the full model verifies (docs/methods.md).

BLT-S spends one decoder pass on every drafted byte. Here a block proposes several at once, and one causal pass of the
decoder over them keeps those that BLT-S would have drafted, with the same noise, and corrects the first other one. The
draft that the full model verifies is thus BLT-S's, byte for byte, from fewer decoder passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastblt.models.vocabulary import MASK_ID
from fastblt.server.decoding.blt_s import finish_round, verify
from fastblt.server.decoding.method import NEXT_DRAFT, Outcome, Plan, Progress, Unmask, fixed_by

#: Missing bytes up to which single rows take as few passes as a block and its filter, and fewer rows.
_FEW = 2


def most_passes(length: int, steps: int = 1) -> int:
    """Passes of the decoder that a draft takes at most: a block's steps and its filter give two bytes or more."""
    return max((steps + 1) * (length // 2) + 1, 2)


class BltDSV:
    """Drafts of `draft_length` bytes, made of blocks of `block_size`, which are filled as `unmask` says.

    An inner round is a block's steps and its filter: the pending byte as a tentative row, whose own byte is sure, with
    a block behind it; then causal rows over the block's bytes, each of which gives the byte that should follow.
    `begun`: the request has had its first pass.
    """

    def __init__(
        self, draft_length: int, block_size: int, unmask: Unmask, max_steps: int | None, *, begun: bool = False
    ) -> None:
        self._length = draft_length
        self._size = block_size
        self._unmask = unmask
        self._max_steps = max_steps
        #: Bytes that the decoder itself would have drafted.
        self._draft: list[int] = []
        #: The step, from 1, that filled each of them in its block; 0 for the decoder's own. Empty where nobody asks.
        self._origin_steps: list[int] = []
        #: The block of this inner round, its denoising steps, and whether nothing of it is masked any more.
        self._block: Sequence[int] = ()
        self._steps = 0
        self._fixed: list[int] = []
        self._filled = False
        #: Whether a call made the draft as far as it should go.
        self._complete = False
        self._begun = begun

    def plan(self, known: int, computed: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        missing = min(self._length, left - 1) - len(self._draft)
        if not self._begun or missing <= 0 or self._complete:
            plan = verify(self._draft if self._begun else (), known, computed)
            if self._draft:
                plan.draft_next(self._length, self._whole_step(), self._passes(self._length), self._size)
            return plan
        start = computed + len(self._draft)
        if self._filled:
            return Plan(start + 1, len(self._block), upstream=False, draft=True, samples=len(self._block))
        if self._block:
            step, repeat = self._step()
            return Plan(
                start + 1, 0, upstream=False, draft=True, block_ids=self._block, unmask=step, repeat=repeat
            )  # fmt: skip
        if missing <= _FEW:
            # The last drafted byte completes what is verified next.
            end = start + missing + 1
            return Plan(start, 1, upstream=False, draft=True, samples=1, scan_to=end, repeat=missing)
        # The filter gives a byte behind the block's last one.
        block = [MASK_ID] * min(self._size, missing - 1)
        plan = Plan(start, 1, upstream=False, draft=True, samples=1, block_ids=block)
        plan.unmask, plan.repeat = self._step()
        if not self._draft:
            plan.next_length, plan.next_block, plan.repeat = missing, self._size, self._passes(missing)
        return plan

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.draft:
            draft, origins = self._draft, self._origin_steps
            self.reset()
            self._begun = True
            return finish_round(draft, plan, outcome, origins if len(origins) == len(draft) else ())
        if plan.block_ids:
            if outcome.block_steps:
                self._fixed = fixed_by(self._fixed, outcome.block_steps, self._steps)
            self._steps += outcome.steps
            self._block, self._filled = outcome.block_ids, outcome.block_done
            draft = [*self._draft, *self._block] if self._filled else self._draft
            return Progress(draft=draft, steps=outcome.steps)
        if not self._filled:
            # Single rows, or a whole draft.
            self._draft += outcome.ids
            if len(outcome.ids) == 1:
                self._origin_steps.append(0)
            self._complete = plan is NEXT_DRAFT
            steps = outcome.steps if plan is NEXT_DRAFT else 0
            return Progress(draft=self._draft, steps=steps, proposed=outcome.proposed, passed=outcome.passed)
        # The block's first byte was the pending row's own; then those that the filter agrees with, and its own byte.
        proposed = len(self._block) - 1
        self._draft += (self._block[0], *outcome.ids)
        self._origin_steps += [*self._fixed[: 1 + outcome.accepted], 0]
        self._block, self._steps, self._fixed, self._filled = (), 0, [], False
        # What was computed of refused bytes goes; the filter's own byte has no rows yet.
        keep = plan.start + outcome.accepted + 1
        return Progress(draft=self._draft, keep=keep, proposed=proposed, passed=outcome.accepted)

    def _whole_step(self) -> Unmask:
        """How blocks that begin anew are filled."""
        return self._unmask if self._max_steps is None else replace(self._unmask, left=self._max_steps)

    def _passes(self, length: int) -> int:
        steps = 1 if self._whole_step().fills else min(self._max_steps or self._size, self._size)
        return most_passes(length, steps)

    def _step(self) -> tuple[Unmask, int]:
        """How the block's next step fills, and how many steps may follow one another."""
        step = self._unmask
        if self._max_steps is not None:
            step = replace(step, left=self._max_steps - self._steps)
        # Every step fixes a byte.
        return step, 1 if step.fills else self._size

    def reset(self) -> None:
        self._draft, self._origin_steps = [], []
        self._block, self._steps, self._fixed, self._filled = (), 0, [], False
        self._complete = self._begun = False
