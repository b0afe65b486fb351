"""Where one completion stands in its grammar, as far as the engine's thread knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID
from fastblt.server.engine.constraints.grammar_worker import Walk
from fastblt.server.request import StructuredOutput

#: Processor time that one completion's grammar may take: at first, and more for every byte of it.
SECONDS, SECONDS_PER_BYTE = 0.5, 5e-4

#: How long a completion may keep steps waiting for its masks: at most, and what every answer adds (seconds).
PATIENCE, PATIENCE_GAINED = 2e-3, 1e-3

_EXCEEDED = "following it took more processor time or memory than one request may have"


class Pool(Protocol):
    """Where the processes are."""

    def knows(self, cursor: GrammarCursor) -> bool: ...

    def ask(self, cursor: GrammarCursor, walk: Walk) -> None: ...

    def forget(self, cursor: GrammarCursor) -> None: ...

    def follows(self, cursor: GrammarCursor) -> bool: ...

    def wait(self, cursors: Sequence[GrammarCursor], *, alone: bool) -> None: ...


class GrammarCursor:
    """Masks behind the fixed bytes and behind bytes drafted after them, the tape.

    They are made by a process of the pool, which is asked where they run out; until it answers the cursor is `waiting`,
    and must not be moved on. The answer is a function of the bytes, whenever it comes and however often it was asked
    for. Where the process knows of the completion no more, it is told of it from the start.
    """

    def __init__(self, pool: Pool, structured: StructuredOutput, key: int) -> None:
        self.structured = structured
        self.key = key
        #: Seconds for which steps may still be kept waiting.
        self.patience = PATIENCE
        #: Whether an answer is to come.
        self.waiting = False
        #: Why nothing is known behind the fixed bytes, nor ever will be.
        self.failure: str | None = None
        #: Whether that is because the grammar cannot be used at all.
        self.refused = False
        #: Whether it was dear enough to be left to a process for good.
        self.dear = False
        #: Processor time that it has taken.
        self.seconds = 0.0
        self._pool = pool
        self._fixed = bytearray()
        self._told = 0
        self._lost = False
        self._path = b""
        self._tape: list[int] = []
        #: Behind each beginning of the tape, bool [260]. One less than there are where `_problem` says why.
        self._masks: list[np.ndarray] = []
        self._problem: str | None = None
        self._ask(b"")

    @property
    def length(self) -> int:
        """How many bytes are fixed."""
        return len(self._fixed)

    @property
    def allowed(self) -> np.ndarray | None:
        """bool [260]: what may follow the fixed bytes; None while that is not known."""
        return self._masks[0] if self._masks else None

    @property
    def on_the_spot(self) -> bool:
        """Whether no process is needed to follow it."""
        return self._pool.follows(self)

    def commit(self, token: int) -> None:
        """One more id is fixed: a byte that was allowed."""
        self._fixed.append(token - BYTE_OFFSET)
        if not self._tape or self._tape[0] != token:
            self._tape, self._masks, self._problem = [], [], None
            self._ask(b"")
            return
        del self._tape[0], self._masks[0]
        if not self._masks:
            self.failure = self._problem

    def ready(self, path: Sequence[int]) -> bool:
        """Whether all that `along` can say of `path` is known; if not, it is asked for."""
        if self.failure is not None:
            return True
        if self.waiting:
            return False
        for at, token in enumerate(path):
            if at == len(self._masks) or token == EOS_ID or not self._masks[at][token]:
                return True
            if at == len(self._tape) or self._tape[at] != token:
                self._ask(_bytes(path))
                return not self.waiting and self.ready(path)
        return True

    def reach(self, path: Sequence[int]) -> bool:
        """`ready`, after as long a wait as a step may have."""
        if not self.ready(path) and self.waiting:
            self._pool.wait([self], alone=False)
        return self.ready(path)

    def along(self, path: Sequence[int]) -> list[np.ndarray]:
        """bool [260] each: what may follow the fixed ids, and those with the first, second, ... of `path`.

        The list ends behind the last id that is allowed, before EOS, where the grammar gets too complex, or where more
        is not known.
        """
        known = 0
        for at, token in enumerate(path):
            if at >= len(self._masks) or not self._masks[at][token]:
                break
            if at == len(self._tape) or self._tape[at] != token:
                break
            known += 1
        return self._masks[: known + 1]

    def close(self) -> None:
        """The completion has ended."""
        self._pool.forget(self)

    # For the pool.

    def take(self, masks: list[np.ndarray], tape: list[int], seconds: float, problem: str | None) -> None:
        """What was found, in so many seconds of processor time."""
        self.waiting = self._lost = False
        self.patience = min(max(self.patience, 0.0) + PATIENCE_GAINED, PATIENCE)
        self.seconds += seconds
        self._masks, self._tape, self._problem = masks, tape, problem
        if not self._masks:
            self.failure = problem
        elif self._left <= 0:
            self._fail(_EXCEEDED)

    def ask_again(self) -> None:
        """What was asked will not be answered by whom it was asked."""
        self._ask(self._path)

    def refuse(self, reason: str) -> None:
        """The grammar cannot be used at all."""
        self.refused = True
        self._fail(reason)

    def lose(self, seconds: float) -> None:
        """The process ended after so many seconds' work on it. That may have had other reasons, but not twice."""
        self.seconds += seconds
        if self._lost or self._left <= 0:
            self._fail(_EXCEEDED)
        self._lost = True

    @property
    def _left(self) -> float:
        return SECONDS + SECONDS_PER_BYTE * len(self._fixed) - self.seconds

    def _fail(self, reason: str) -> None:
        self.waiting, self.failure = False, reason
        self._tape, self._masks = [], []

    def _ask(self, path: bytes) -> None:
        fresh = not self._pool.knows(self)
        fixed = bytes(self._fixed if fresh else self._fixed[self._told :])
        self._path, self._told, self.waiting = path, len(self._fixed), True
        self._pool.ask(self, Walk(self.key, fresh, fixed, path, max(self._left, 1e-3)))


def _bytes(path: Sequence[int]) -> bytes:
    """Up to the first id that is no byte."""
    whole = next((at for at, token in enumerate(path) if token < BYTE_OFFSET), len(path))
    return bytes(token - BYTE_OFFSET for token in path[:whole])
