"""BLT-D: block diffusion in the local decoder, nothing verified (arXiv 2605.08044 §3.1, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastblt.models.vocabulary import MASK_ID
from fastblt.server.decoding.method import Outcome, Plan, Progress, Unmask, fixed_by


class BltD:
    """One block a round. Its first pass runs the previous block's bytes causally and closes the open patch, whose
    latent the new block reads; the block's masks are then filled in a few decoder passes.

    With `align_blocks` single causal bytes finish the open patch before a block begins.
    """

    def __init__(self, block_size: int, unmask: Unmask, max_steps: int | None, align_blocks: bool = False) -> None:
        self._align = align_blocks
        self._size = block_size
        self._unmask = unmask
        self._max_steps = max_steps
        self._block: Sequence[int] = ()
        self._steps = 0
        #: The step, from 1, that filled each position of the block; 0 where it is still masked.
        self._fixed: list[int] = []

    def plan(self, known: int, computed: int, left: int) -> Plan:
        step = self._unmask
        if self._max_steps is not None:
            step = replace(step, left=self._max_steps - self._steps)
        # If there is a next round, it runs the block's bytes causally and needs their entropies.
        scan_to = known + self._size if left > self._size else 0
        # Every step fills a position at least.
        repeat = 1 if step.fills else self._size
        if not self._block:
            rows = known - computed
            finish = Plan(computed, rows, samples=1, scan_to=known + 1 if left > 1 else 0) if self._align else None
            block = [MASK_ID] * self._size
            return Plan(
                computed,
                rows,
                block_ids=block,
                provisional=True,
                unmask=step,
                scan_to=scan_to,
                if_open=finish,
                repeat=repeat,
            )
        return Plan(
            known,
            0,
            upstream=False,
            block_ids=self._block,
            provisional=True,
            unmask=step,
            scan_to=scan_to,
            repeat=repeat,
        )

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.block_ids:
            return Progress(commit=outcome.ids)
        self._fixed = fixed_by(self._fixed, outcome.block_steps, self._steps)
        self._steps += outcome.steps
        if not outcome.block_done:
            self._block = outcome.block_ids
            return Progress(steps=outcome.steps)
        fixed = self._fixed
        self.reset()
        return Progress(commit=outcome.block_ids, commit_steps=fixed, steps=outcome.steps, rounds=1)

    def reset(self) -> None:
        self._block = ()
        self._steps = 0
        self._fixed = []
