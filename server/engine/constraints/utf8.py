"""UTF-8 as an automaton over ids: which ids lead from what stands there to whole characters, within the room left.

A state says what may follow: how many continuation bytes, and for the first of them which (RFC 3629 leaves out overlong
forms, surrogates, and all above U+10FFFF). `OVER` is reached by EOS and never left. Sets of states are integers, a bit
a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID, VOCAB_SIZE

#: Between two characters.
WHOLE = 0
_LAST, _TWO, _THREE = 1, 2, 3
_E0, _ED, _F0, _F4 = 4, 5, 6, 7
OVER = 8
DEAD = 9
_STATES = 10

#: Bytes that each state still needs.
_NEEDS = (0, 1, 2, 3, 2, 2, 3, 3, 0, 5)
#: More room than this makes no difference.
_ROOM = 4


def _transitions() -> list[list[int]]:
    table = [[DEAD] * VOCAB_SIZE for _ in range(_STATES)]

    def lead(state: int, first: int, last: int, to: int) -> None:
        for byte in range(first, last + 1):
            table[state][byte + BYTE_OFFSET] = to

    lead(WHOLE, 0x00, 0x7F, WHOLE)
    lead(WHOLE, 0xC2, 0xDF, _LAST)
    lead(WHOLE, 0xE1, 0xEF, _TWO)
    lead(WHOLE, 0xE0, 0xE0, _E0)
    lead(WHOLE, 0xED, 0xED, _ED)
    lead(WHOLE, 0xF1, 0xF3, _THREE)
    lead(WHOLE, 0xF0, 0xF0, _F0)
    lead(WHOLE, 0xF4, 0xF4, _F4)
    lead(_LAST, 0x80, 0xBF, WHOLE)
    lead(_TWO, 0x80, 0xBF, _LAST)
    lead(_THREE, 0x80, 0xBF, _TWO)
    lead(_E0, 0xA0, 0xBF, _LAST)
    lead(_ED, 0x80, 0x9F, _LAST)
    lead(_F0, 0x90, 0xBF, _TWO)
    lead(_F4, 0x80, 0x8F, _TWO)
    table[WHOLE][EOS_ID] = OVER
    table[OVER] = [OVER] * VOCAB_SIZE
    return table


_NEXT = _transitions()
_NEXT_ARRAY = np.array(_NEXT)
#: By state, the states that some byte leads to. EOS is no byte: nobody plans to end where the model has not.
_BY_BYTES = [
    sum(1 << to for to in {_NEXT[state][b + BYTE_OFFSET] for b in range(256)} - {DEAD}) for state in range(_STATES)
]


def _within(room: int) -> int:
    """The states from which at most `room` bytes make the last character whole."""
    return sum(1 << state for state in range(_STATES) if _NEEDS[state] <= room)


def step(state: int, token: int) -> int:
    """The state after one more id; DEAD if it cannot stand there."""
    return _NEXT[state][token]


@lru_cache(maxsize=4096)
def mask(before: int, after: int) -> np.ndarray:
    """bool [260], not to be written to: the ids that lead from a state of `before` to one of `after`."""
    sources = [state for state in range(_STATES) if before >> state & 1]
    targets = np.array([after >> state & 1 for state in range(_STATES)], dtype=bool)
    allowed: np.ndarray = targets[_NEXT_ARRAY[sources]].any(0)
    allowed.flags.writeable = False
    return allowed


@lru_cache(maxsize=1 << 16)
def _behind(before: int, token: int) -> int:
    """The states that an id leads to from any of `before`; [MASK] is any byte."""
    after = 0
    for state in range(_STATES):
        if before >> state & 1:
            after |= _BY_BYTES[state] if token == MASK_ID else 1 << _NEXT[state][token]
    return after & ~(1 << DEAD)


@lru_cache(maxsize=1 << 16)
def _ahead(token: int, after: int) -> int:
    """The states from which an id leads to one of `after`; [MASK] is any byte."""
    if token == MASK_ID:
        return sum(1 << state for state in range(_STATES) if _BY_BYTES[state] & after)
    return sum(1 << state for state in range(_STATES) if after >> _NEXT[state][token] & 1)


def allowed(state: int, left: int) -> np.ndarray | None:
    """bool [260]: what may stand next with `left` >= 1 bytes to come, this one included. None: nothing is forbidden.

    Behind an end, and behind bytes that are no UTF-8 (drafts that will be refused), it does not matter.
    """
    if state in (OVER, DEAD) or left < 1:
        return None
    return mask(1 << state, _within(min(left, _ROOM) - 1))


class BlockPaths:
    """A block [n] that begins in `state`, with `left` bytes to come from its first on: some ids stand, [MASK] is open.

    A byte may stand at an open position iff it lies on a path through the standing ids to whole characters, within the
    block and what may come after it. What lies beyond `left` is never seen. As long as a path exists to begin with and
    every open position gets an allowed id, one exists in the end.
    """

    def __init__(self, state: int, left: int, ids: Sequence[int]) -> None:
        self._ids = ids
        self._seen = min(len(ids), left)
        self._before = 1 << state
        after = _within(min(left - self._seen, _ROOM))
        #: By position: the states behind it from which the rest can go on.
        self._after = [after] * self._seen
        for at in range(self._seen - 1, 0, -1):
            after = _ahead(ids[at], after)
            self._after[at - 1] = after
        self._at = 0

    def allowed(self) -> np.ndarray | None:
        """bool [260]: what may stand at the next position, given what `take` was told of those before."""
        if self._at >= self._seen or self._before == 1 << OVER:
            return None
        return mask(self._before, self._after[self._at])

    def take(self, token: int) -> None:
        """Go on to the position after the next, whose id this is ([MASK]: still open)."""
        self._before = _behind(self._before, token)
        self._at += 1
