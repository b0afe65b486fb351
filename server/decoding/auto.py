"""`auto`: every round drafts as a controller says when it begins, in any lossless way; bytes do not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.unmasking import ONE_STEP
from server.decoding.blt import Blt
from server.decoding.blt_dv import BltDV
from server.decoding.blt_s import BltS
from server.decoding.method import Method, Outcome, Plan, Progress, Unmask
from server.request import DecodingMethod


@dataclass(frozen=True)
class Draft:
    """How a round drafts: `length` bytes by BLT-S or by BLT-DV in one step, or none (BLT)."""

    method: DecodingMethod = DecodingMethod.BLT
    length: int = 0


class Auto:
    """Between rounds a request's state is a function of its bytes alone (design §3), so each may draft differently."""

    def __init__(self, choose: Callable[[], Draft]) -> None:
        self._choose = choose
        self._inner: Method = Blt()
        self._between = True
        self._begun = False
        #: Of the round that is under way, or was the last.
        self.draft = Draft()

    def plan(self, known: int, computed: int, left: int) -> Plan:
        if self._between:
            # The first pass gives the first byte at once, whatever will be drafted later.
            self.draft = self._choose() if self._begun else Draft()
            self._inner = _method(self.draft)
            self._between = False
        return self._inner.plan(known, computed, left)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        progress = self._inner.advance(plan, outcome)
        if not plan.draft:
            self._between = self._begun = True
        return progress

    def reset(self) -> None:
        self._between, self._begun = True, False


def _method(draft: Draft) -> Method:
    if draft.method == DecodingMethod.BLT_S:
        return BltS(draft.length, begun=True)
    if draft.method == DecodingMethod.BLT_DV:
        return BltDV(draft.length, Unmask(ONE_STEP, 0.0), None, begun=True)
    return Blt()
