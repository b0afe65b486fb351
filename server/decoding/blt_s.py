"""BLT-S: the decoder drafts alone on the newest closed latent, the full model verifies (digest §5)."""

from __future__ import annotations

from server.decoding.method import Outcome, Plan, Progress


def accepted_length(draft: list[int], targets: list[int]) -> int:
    """How many drafted bytes are the bytes that the full model chose at their positions."""
    for at, (drafted, target) in enumerate(zip(draft, targets, strict=False)):
        if drafted != target:
            return at
    return len(draft)


def verify(draft: list[int], known: int, computed: int) -> Plan:
    """All modules over the rows still to compute and the draft: the newest byte and every drafted one give a byte."""
    return Plan(computed, known - computed + len(draft), select=len(draft) + 1)


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
        rounds=1,
    )


class BltS:
    def __init__(self, draft_length: int) -> None:
        self._length = draft_length
        self._draft: list[int] = []

    def plan(self, known: int, computed: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        wanted = min(self._length, left - 1)
        if drafting(known, computed) and len(self._draft) < wanted:
            return Plan(computed + len(self._draft), 1, upstream=False, select=1)
        return verify(self._draft, known, computed)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.upstream:
            self._draft += outcome.ids
            return Progress(draft=self._draft)
        draft, self._draft = self._draft, []
        return settle(draft, plan, outcome)

    def reset(self) -> None:
        self._draft = []
