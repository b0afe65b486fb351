"""BLT-S: the decoder drafts alone on the newest closed latent, the full model verifies (digest §5)."""

from __future__ import annotations

from server.decoding.method import Outcome, Plan, Progress


def accepted_length(draft: list[int], targets: list[int]) -> int:
    """How many drafted bytes are the bytes that the full model chose at their positions."""
    for at, (drafted, target) in enumerate(zip(draft, targets, strict=False)):
        if drafted != target:
            return at
    return len(draft)


def verify(draft: list[int], known: int) -> Plan:
    """The verification pass: the pending byte and the draft through all modules, every row giving its byte."""
    rows = len(draft) + 1
    return Plan(start=known - 1, causal=rows, select=rows)


def settle(draft: list[int], plan: Plan, outcome: Outcome) -> Progress:
    """Accepted bytes and the one after them; rows up to the last accepted stay (design §3, rollback)."""
    accepted = accepted_length(draft, outcome.ids)
    return Progress(
        commit=outcome.ids[: accepted + 1],
        keep=plan.start + 1 + accepted,
        drafted=len(draft),
        accepted=accepted,
        rounds=1,
    )


class BltS:
    keeps_pending = True

    def __init__(self, draft_length: int) -> None:
        self._length = draft_length
        self._draft: list[int] = []

    def plan(self, known: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        if len(self._draft) < min(self._length, left - 1):
            return Plan(start=known - 1 + len(self._draft), causal=1, upstream=False, select=1)
        return verify(self._draft, known)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if not plan.upstream:
            self._draft += outcome.ids
            return Progress(draft=self._draft)
        draft, self._draft = self._draft, []
        return settle(draft, plan, outcome)

    def reset(self) -> None:
        self._draft = []
