"""BLT-S: the decoder drafts alone on the newest closed latent, the full model verifies (arXiv 2605.08044 §5.1,
Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from fastblt.server.decoding.method import Outcome, Plan, Progress


def verify(draft: Sequence[int], known: int, computed: int, *, paper: bool = False) -> Plan:
    """All modules over the rows still to compute and the draft: the newest byte and every drafted one give a byte.

    Under the paper's accounting the global transformer takes part even where no patch closed.
    """
    rows = known - computed + len(draft)
    return Plan(computed, rows, samples=len(draft) + 1, provisional=paper and bool(draft))


def finish_round(draft: Sequence[int], plan: Plan, outcome: Outcome) -> Progress:
    """Accepted bytes and the one after them; rows up to the last accepted stay (design §3, rollback)."""
    return Progress(
        commit=outcome.ids,
        keep=plan.end - len(draft) + outcome.accepted,
        drafted=len(draft),
        accepted=outcome.accepted,
        rounds=1 if draft else 0,
    )


class BltS:
    """`paper_accounting` drafts on the open patch's latent, at the price of an upstream pass of its own (design §2.8),
    and does not shorten the last draft. `begun`: the request has had its first pass."""

    def __init__(self, draft_length: int, paper_accounting: bool = False, *, begun: bool = False) -> None:
        self._length = draft_length
        self._paper = paper_accounting
        self._draft: list[int] = []
        #: The first pass gives the first byte at once: it drafts nothing, however little is left to compute.
        self._begun = begun

    def plan(self, known: int, computed: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        wanted = self._length if self._paper else min(self._length, left - 1)
        if self._begun and len(self._draft) < wanted:
            upstream = self._paper and not self._draft
            start, missing = computed + len(self._draft), wanted - len(self._draft)
            repeat = 1 if upstream else missing
            # The last drafted byte completes what is verified next.
            scan_to = start + missing + 1 if repeat == missing else 0
            return Plan(
                start, 1, upstream, draft=True, samples=1, provisional=self._paper, scan_to=scan_to, repeat=repeat
            )  # fmt: skip
        plan = verify(self._draft, known, computed, paper=self._paper)
        if self._draft and not self._paper:
            plan.draft_next(self._length, None, self._length)
        return plan

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if plan.draft:
            self._draft += outcome.ids
            return Progress(draft=self._draft)
        draft, self._draft = self._draft, []
        self._begun = True
        return finish_round(draft, plan, outcome)

    def reset(self) -> None:
        self._draft = []
        self._begun = False
