"""Which prompts are computed in a pass, and how many rows each gets.

Shortest remainder first: whoever needs little gets the first byte soon, and a long prompt hardly notices. A part of
every pass is the oldest prompt's, so that no stream of shorter ones can starve it. A prompt whose next page another one
computes waits for that, and then goes on behind it (`Leaders`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fastblt.server.engine.pass_time import PromptBudget

if TYPE_CHECKING:
    from fastblt.server.engine.sequence import Sequence

#: Part of a pass's prompt rows that the oldest prompt gets.
OLDEST_SHARE = 0.25


def divide(
    prompts: list[Sequence],
    budget: PromptBudget,
    leaders: Leaders | None,
    *,
    room: Callable[[Sequence, int], int],
    join: Callable[[Sequence], None],
) -> dict[Sequence, int]:
    """The rows that each of `prompts` gets, within `budget`.

    `room` says how many rows there are pages for, and counts them as used. `leaders` are those whose rows are on their
    way already; None: nobody shares what others compute. `join` lets a sequence that has waited for a
    leader go on behind what that one computed.
    """
    rows: dict[Sequence, int] = {}
    if not prompts:
        return rows
    if leaders is not None:
        ahead = Leaders(leaders.page, leaders.worth, [*leaders.all(), *prompts])
        for sequence in prompts:
            # What it waited for is done: what is left of it decides on its place.
            if sequence.follows and not ahead.lead(sequence, ahead=True):
                join(sequence)
                sequence.follows = False
    order = sorted(prompts, key=lambda s: (s.request.priority, s.known - s.decoded, s.number))
    oldest = min(prompts, key=lambda s: (s.request.priority, s.number))
    kept = 0.0 if oldest is order[0] else OLDEST_SHARE

    def give(sequence: Sequence, kept: float) -> None:
        if sequence.follows:
            join(sequence)
            sequence.follows = False
        had = rows.get(sequence, 0)
        position = sequence.decoded + had
        fitting = budget.fit(position, sequence.known - position, kept)
        if fitting and (fitting := room(sequence, fitting + had) - had) > 0:
            budget.take(position, fitting)
            rows[sequence] = had + fitting
            if leaders is not None:
                leaders.add(sequence)

    def led(sequence: Sequence) -> bool:
        return leaders is not None and leaders.lead(sequence)

    for sequence in order:
        if led(sequence):
            sequence.follows = True
        else:
            give(sequence, kept)
    if kept:
        # Its own part, if nobody who is computed now does it for it, and what it leaves of that.
        if oldest in rows or not led(oldest):
            give(oldest, 0.0)
        for sequence in order:
            if sequence in rows:
                give(sequence, 0.0)
    return rows


class Leaders:
    """Prompts that are being computed: whoever has the same text up to there need not compute it too.

    A sequence waits only for one that is served before it, and only for pages that it needs itself. So it never waits
    longer than it would take to compute them; and once that was for nothing, since the other one was preempted, it
    waits for nobody again. It begins to wait only where that spares it `worth` rows: they have to pay for one pass
    more. Texts are compared by keys of their pages: each is a hash of the page and of all before it, so equal keys at
    one place mean equal texts up to there.
    """

    def __init__(self, page: int, worth: int, running: Iterable[Sequence] = ()) -> None:
        self.page, self.worth = page, worth
        self._by_first: dict[int, list[Sequence]] = {}
        for sequence in running:
            self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A sequence is computed in this pass."""
        keys = page_keys(sequence, self.page)
        if keys:
            own = self._by_first.setdefault(keys[0], [])
            if sequence not in own:
                own.append(sequence)

    def all(self) -> list[Sequence]:
        """Those that were added."""
        return [sequence for own in self._by_first.values() for sequence in own]

    def lead(self, sequence: Sequence, *, ahead: bool = False) -> bool:
        """Whether another one computes, or has just computed, the next page of a sequence. `ahead`: one that is further
        than it."""
        if sequence.params.prompt_logprobs is not None or sequence.waited_in_vain:
            # It needs every row itself, or nobody brought it any.
            return False
        keys = page_keys(sequence, self.page)
        for other in self._by_first.get(keys[0], ()) if keys else ():
            if other is sequence or (ahead and other.decoded <= sequence.decoded):
                continue
            theirs = page_keys(other, self.page)
            at = max(sequence.decoded, other.decoded) // self.page
            # Who has begun to wait waits for all that is shared; others look further ahead.
            if not sequence.follows:
                at = max(at, sequence.decoded // self.page + -(-self.worth // self.page) - 1)
            if at < len(keys) and at < len(theirs) and keys[at] == theirs[at]:
                return True
        return False


def page_keys(sequence: Sequence, page: int) -> list[int]:
    """A key for every full page of a sequence's prompt, for it and all before it."""
    if sequence.page_keys is None:
        ids = array("H", sequence.ids[: sequence.prompt_length])
        key = hash(sequence.request.cache_salt)
        sequence.page_keys = [
            key := hash((key, ids[at : at + page].tobytes())) for at in range(0, len(ids) - page + 1, page)
        ]
    return sequence.page_keys
