"""BLT-D: block diffusion in the local decoder, nothing verified (digest §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from models.vocabulary import MASK_ID
from server.decoding.method import Outcome, Plan, Progress, Unmask


class BltD:
    """A block a round: the previous block's bytes run causally, the open patch is closed for the new block, whose masks
    are then filled in a few decoder passes. With `align_blocks`, causal bytes finish the open patch first."""

    def __init__(self, block_size: int, unmask: Unmask, max_steps: int | None, align_blocks: bool = False) -> None:
        self._align = align_blocks
        self._size = block_size
        self._unmask = unmask
        self._last = replace(unmask, last_step=True)
        self._max_steps = max_steps
        self._block: Sequence[int] = ()
        self._steps = 0
        #: The step that fixed each byte of the block; 0 where it is still masked.
        self._fixed: list[int] = []

    def plan(self, known: int, computed: int, left: int) -> Plan:
        step = self._last if self._steps + 1 == self._max_steps else self._unmask
        # The block's bytes run causally in the next round, if there is one.
        scan_to = known + self._size if step.fills and left > self._size else 0
        if not self._block:
            rows = known - computed
            finish = Plan(computed, rows, select=1, scan_to=known + 1 if left > 1 else 0) if self._align else None
            block = [MASK_ID] * self._size
            return Plan(
                computed,
                rows,
                block_ids=block,
                provisional=True,
                unmask=step,
                scan_to=scan_to,
                if_open=finish,
            )
        return Plan(known, 0, upstream=False, block_ids=self._block, provisional=True, unmask=step, scan_to=scan_to)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.block_ids:
            return Progress(commit=outcome.ids)
        self._steps += 1
        now = [0 if token == MASK_ID else self._steps for token in outcome.block_ids]
        fixed = self._fixed = [earlier or at for earlier, at in zip(self._fixed or [0] * len(now), now, strict=True)]
        if not outcome.block_done:
            self._block = outcome.block_ids
            return Progress(steps=1)
        self.reset()
        return Progress(commit=outcome.block_ids, commit_steps=fixed, steps=1, rounds=1)

    def reset(self) -> None:
        self._block = ()
        self._steps = 0
        self._fixed = []
