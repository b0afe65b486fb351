"""BLT-S: the decoder drafts alone on the newest closed latent, the full model verifies (digest §5)."""

from __future__ import annotations

from server.decoding.method import Outcome, Plan, Progress


def accepted_length(draft: list[int], targets: list[int]) -> int:
    """How many drafted bytes are the bytes that the full model chose at their positions."""
    for at, (drafted, target) in enumerate(zip(draft, targets, strict=False)):
        if drafted != target:
            return at
    return len(draft)


def verify(draft: list[int], known: int, computed: int, *, paper: bool = False) -> Plan:
    """All modules over the rows still to compute and the draft: the newest byte and every drafted one give a byte.

    Under the paper's accounting the global transformer takes part even where no patch closed.
    """
    rows = known - computed + len(draft)
    return Plan(computed, rows, select=len(draft) + 1, provisional=paper and bool(draft))


def drafting(known: int, computed: int) -> bool:
    """Whether only the newest byte is pending: the prompt's own pass drafts nothing, for no latent is there yet."""
    return computed > 0 and known - computed == 1


def settle(draft: list[int], plan: Plan, outcome: Outcome) -> Progress:
    """Accepted bytes and the one after them; rows up to the last accepted stay (design §3, rollback)."""
    accepted = accepted_length(draft, outcome.ids)
    return Progress(
        commit=outcome.ids[: accepted + 1],
        keep=plan.end - len(draft) + accepted,
        drafted=len(draft),
        accepted=accepted,
        rounds=1 if draft else 0,
    )


class BltS:
    """`paper_accounting` drafts on the open patch's latent, at the price of an upstream pass of its own (design §2.8),
    and does not shorten the last draft."""

    def __init__(self, draft_length: int, paper_accounting: bool = False) -> None:
        self._length = draft_length
        self._paper = paper_accounting
        self._draft: list[int] = []

    def plan(self, known: int, computed: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        wanted = self._length if self._paper else min(self._length, left - 1)
        if drafting(known, computed) and len(self._draft) < wanted:
            upstream = self._paper and not self._draft
            start = computed + len(self._draft)
            return Plan(start, 1, upstream=upstream, draft=True, select=1, provisional=self._paper)
        return verify(self._draft, known, computed, paper=self._paper)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if plan.draft:
            self._draft += outcome.ids
            return Progress(draft=self._draft)
        draft, self._draft = self._draft, []
        return settle(draft, plan, outcome)

    def reset(self) -> None:
        self._draft = []
