"""`auto`: a controller chooses each round's lossless draft (of BLT, BLT-S, BLT-DV or BLT-DSV).

The bytes do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fastblt.kernels.unmasking import ONE_STEP
from fastblt.server.decoding.blt import Blt
from fastblt.server.decoding.blt_dsv import BltDSV, most_passes
from fastblt.server.decoding.blt_dv import BltDV
from fastblt.server.decoding.blt_s import BltS
from fastblt.server.decoding.method import NEXT_DRAFT, Method, Outcome, Plan, Progress, Unmask
from fastblt.server.request import DecodingMethod

#: How BLT-DV and BLT-DSV fill their blocks under `auto`.
_ONE_STEP = Unmask(ONE_STEP, 0.0)


@dataclass(frozen=True)
class Draft:
    """How a round drafts: `length` bytes by BLT-S, by BLT-DV in one step, by BLT-DSV in blocks of `block` bytes, or
    none (BLT)."""

    method: DecodingMethod = DecodingMethod.BLT
    length: int = 0
    block: int = 0


class Drafts(Protocol):
    """Who chooses the drafts of all requests."""

    def next(self) -> Draft:
        """What a round that begins now drafts."""

    def ended(self, draft: Draft) -> None:
        """A round that drafted so has ended."""


class Auto:
    """Asks `drafts` for the draft of every round, and lets that method make it.

    Between rounds a request's state is a function of its bytes alone (design §3), so rounds may draft differently.
    """

    def __init__(self, drafts: Drafts) -> None:
        self._drafts = drafts
        self._inner: Method = Blt()
        self._between = True
        self._begun = False
        #: The draft of the next round, where it was asked for already.
        self._next: Draft | None = None
        #: The draft of the present round, or of the last one.
        self.draft = Draft()

    def plan(self, known: int, computed: int, left: int) -> Plan:
        if self._between:
            self._begin()
        plan = self._inner.plan(known, computed, left)
        if not self._begun:
            # A draft comes next, most likely, and its verification passes the entropy model.
            plan.scan_to = 0
        if plan.samples > 1 and not plan.draft:
            # A verification goes on with the next round's draft.
            plan.stop_after(1)
            # It may be planned again before it runs.
            self._next = self._next or self._drafts.next()
            length = self._next.length
            if self._next.method == DecodingMethod.BLT_DV:
                plan.draft_next(length, _ONE_STEP, 1)
            elif self._next.method == DecodingMethod.BLT_DSV:
                plan.draft_next(length, _ONE_STEP, most_passes(length), self._next.block)
            elif length:
                plan.draft_next(length, None, length)
        return plan

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if plan is NEXT_DRAFT and self._between:
            # Behind a verification. A whole draft that a plan asked for is of the round that is under way.
            self._begin()
        progress = self._inner.advance(plan, outcome)
        if not plan.draft:
            if self._begun:
                self._drafts.ended(self.draft)
            self._between = self._begun = True
        return progress

    def _begin(self) -> None:
        # The first pass gives the first byte at once, whatever will be drafted later.
        self.draft = self._next or (self._drafts.next() if self._begun else Draft())
        self._inner = _method(self.draft)
        self._between, self._next = False, None

    def reset(self) -> None:
        self._between, self._begun, self._next = True, False, None


def _method(draft: Draft) -> Method:
    if draft.method == DecodingMethod.BLT_S:
        return BltS(draft.length, begun=True)
    if draft.method == DecodingMethod.BLT_DV:
        return BltDV(draft.length, _ONE_STEP, None, begun=True)
    if draft.method == DecodingMethod.BLT_DSV:
        return BltDSV(draft.length, draft.block, _ONE_STEP, None, begun=True)
    return Blt()
