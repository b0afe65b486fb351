"""UTF-8 as an automaton over ids: which ids lead to a text of whole characters within the bytes that are left.

A state says what may follow: how many continuation bytes, and which values the first of them may have (RFC 3629
excludes overlong forms, surrogates, and all above U+10FFFF). EOS leads to `OVER`, which has no way out. An invalid byte
leads to `DEAD`. A set of states is an integer with one bit for each state.
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
#: A character has at most 4 bytes, so more room than this makes no difference.
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
#: For each state, the set of states that some byte leads to. EOS is left out: an open position is planned as a byte.
_BY_BYTES = [
    sum(1 << to for to in {_NEXT[state][b + BYTE_OFFSET] for b in range(256)} - {DEAD}) for state in range(_STATES)
]


def _within(room: int) -> int:
    """The states in which at most `room` more bytes complete the last character."""
    return sum(1 << state for state in range(_STATES) if _NEEDS[state] <= room)


def step(state: int, token: int) -> int:
    """The state after one more id; DEAD if the id is invalid there."""
    return _NEXT[state][token]


@lru_cache(maxsize=4096)
def mask(before: int, after: int) -> np.ndarray:
    """bool [260], read-only: the ids that lead from some state of `before` to some state of `after`."""
    sources = [state for state in range(_STATES) if before >> state & 1]
    targets = np.array([after >> state & 1 for state in range(_STATES)], dtype=bool)
    allowed: np.ndarray = targets[_NEXT_ARRAY[sources]].any(0)
    allowed.flags.writeable = False
    return allowed


@lru_cache(maxsize=1 << 16)
def _behind(before: int, token: int) -> int:
    """The states that an id leads to from the states of `before`. MASK_ID stands for any byte."""
    after = 0
    for state in range(_STATES):
        if before >> state & 1:
            after |= _BY_BYTES[state] if token == MASK_ID else 1 << _NEXT[state][token]
    return after & ~(1 << DEAD)


@lru_cache(maxsize=1 << 16)
def _ahead(token: int, after: int) -> int:
    """The states from which an id leads to a state of `after`. MASK_ID stands for any byte."""
    if token == MASK_ID:
        return sum(1 << state for state in range(_STATES) if _BY_BYTES[state] & after)
    return sum(1 << state for state in range(_STATES) if after >> _NEXT[state][token] & 1)


def allowed(state: int, left: int) -> np.ndarray | None:
    """bool [260]: the ids that may come next, with `left` bytes still to come, this one included. None allows all.

    After the end, after invalid bytes (a draft that will be refused) and with no bytes left, the result is None.
    """
    if state in (OVER, DEAD) or left < 1:
        return None
    return mask(1 << state, _within(min(left, _ROOM) - 1))


class BlockPaths:
    """Masks for a block of ids [n], from left to right. Open positions have MASK_ID.

    `state` is the state before the block. `left` is how many bytes the output may still have from the block's first
    position on; positions beyond that are ignored. A byte is allowed at an open position iff some choice for the other
    open positions leads to whole characters, within the block and the bytes that may follow it. If such a choice exists
    at the start, and every open position gets an allowed id, then the finished block is part of one.
    """

    def __init__(self, state: int, left: int, ids: Sequence[int]) -> None:
        self._ids = ids
        self._seen = min(len(ids), left)
        self._before = 1 << state
        after = _within(min(left - self._seen, _ROOM))
        #: For each position, the states after it from which the rest of the block can be completed.
        self._after = [after] * self._seen
        for at in range(self._seen - 1, 0, -1):
            after = _ahead(ids[at], after)
            self._after[at - 1] = after
        self._at = 0

    def allowed(self) -> np.ndarray | None:
        """bool [260]: the ids allowed at the next position, after those passed to `take`. None allows all."""
        if self._at >= self._seen or self._before == 1 << OVER:
            return None
        return mask(self._before, self._after[self._at])

    def take(self, token: int) -> None:
        """Record the id of the next position (MASK_ID if it stays open) and move past it."""
        self._before = _behind(self._before, token)
        self._at += 1
