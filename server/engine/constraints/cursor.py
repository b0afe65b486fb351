"""The engine's view of one completion's position in its grammar. The masks come from another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID
from fastblt.server.engine.constraints.grammar_worker import Walk
from fastblt.server.request import StructuredOutput

#: Processor seconds that one completion's grammar may take: a base, and more for each byte of the completion.
SECONDS, SECONDS_PER_BYTE = 0.5, 5e-4

#: Seconds for which a completion may delay steps while they wait for its masks: the most, and what each answer adds.
PATIENCE, PATIENCE_GAINED = 2e-3, 1e-3

_EXCEEDED = "following it took more processor time or memory than one request may have"


class Pool(Protocol):
    """What a cursor needs of `GrammarPool`, which documents these methods."""

    def knows(self, cursor: GrammarCursor) -> bool: ...

    def ask(self, cursor: GrammarCursor, walk: Walk) -> None: ...

    def forget(self, cursor: GrammarCursor) -> None: ...

    def follows(self, cursor: GrammarCursor) -> bool: ...

    def wait(self, cursors: Sequence[GrammarCursor], *, alone: bool) -> None: ...


class GrammarCursor:
    """Masks after the fixed bytes and along the tape: drafted or forced bytes that follow them.

    A process of the pool makes the masks. When they run out, the cursor asks for more. Until the answer arrives the
    cursor is `waiting` and must not be moved. The answer depends on the bytes only, not on when or how often it was
    asked for. A process that does not know the completion, or no longer does, is sent all its bytes.
    """

    def __init__(self, pool: Pool, structured: StructuredOutput, key: int) -> None:
        self.structured = structured
        self.key = key
        #: Seconds for which it may still delay steps.
        self.patience = PATIENCE
        #: Whether an answer is outstanding.
        self.waiting = False
        #: Why there are no masks after the fixed bytes and never will be; None if all is well.
        self.failure: str | None = None
        #: Whether `failure` means that the grammar cannot be used at all.
        self.refused = False
        #: Whether it was so expensive that from now on a process must do its work, not the engine's thread.
        self.dear = False
        #: Processor seconds used so far.
        self.seconds = 0.0
        #: Whether a process ended that may have been working on it: its next answer is waited for alone.
        self.suspect = False
        self._pool = pool
        self._fixed = bytearray()
        self._told = 0
        self._lost = False
        self._path = b""
        self._known = 0
        self._tape: list[int] = []
        #: bool [260] after each prefix of the tape. The one after the whole tape is missing if `_problem` says why.
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
        """Fix one more id. It must be a byte that was allowed."""
        self._fixed.append(token - BYTE_OFFSET)
        if not self._tape or self._tape[0] != token:
            self._tape, self._masks, self._problem = [], [], None
            self._ask(b"")
            return
        del self._tape[0], self._masks[0]
        if not self._masks:
            self.failure = self._problem

    def ready(self, path: Sequence[int]) -> bool:
        """Whether all masks along `path` are known. Requests them if not."""
        if self.failure is not None:
            return True
        if self.waiting:
            return False
        for at, token in enumerate(path):
            if at == len(self._masks) or token == EOS_ID or not self._masks[at][token]:
                return True
            if at == len(self._tape) or self._tape[at] != token:
                self._ask(_bytes(path), at + 1)
                return not self.waiting and self.ready(path)
        return True

    def reach(self, path: Sequence[int]) -> bool:
        """Like `ready`, but waits for the answer as long as a step may."""
        if not self.ready(path) and self.waiting:
            self._pool.wait([self], alone=False)
        return self.ready(path)

    def along(self, path: Sequence[int]) -> list[np.ndarray]:
        """Masks, bool [260] each: mask i says what may follow the fixed ids and the first i ids of `path`.

        The list ends after the last allowed id of `path`, before EOS, where the grammar gets too complex, or where the
        known masks end.
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

    # Called by the pool.

    def take(self, known: int, masks: list[np.ndarray], tape: list[int], seconds: float, problem: str | None) -> None:
        """Take an answer, which cost `seconds` of processor time: the masks behind the first `known` ones."""
        self.waiting = self._lost = self.suspect = False
        self.patience = min(max(self.patience, 0.0) + PATIENCE_GAINED, PATIENCE)
        self.seconds += seconds
        self._masks, self._tape, self._problem = self._masks[:known] + masks, tape, problem
        if not self._masks:
            self.failure = problem
        elif self._left <= 0:
            self._fail(_EXCEEDED)

    def ask_again(self) -> None:
        """Repeat the last request: the process that got it will not answer."""
        self._ask(self._path, self._known)

    def refuse(self, reason: str) -> None:
        """The grammar cannot be used at all."""
        self.refused = True
        self._fail(reason)

    def lose(self, seconds: float) -> None:
        """The process ended while it worked on this cursor alone, for `seconds`. At the second time in a row, fail."""
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

    def _ask(self, path: bytes, known: int = 0) -> None:
        """Ask for the masks along `path`, of which the first `known` are there."""
        fresh = not self._pool.knows(self)
        fixed = bytes(self._fixed if fresh else self._fixed[self._told :])
        self._path, self._known, self._told, self.waiting = path, known, len(self._fixed), True
        self._pool.ask(self, Walk(self.key, fresh, fixed, path, known, max(self._left, 1e-3), self.suspect))


def _bytes(path: Sequence[int]) -> bytes:
    """The bytes of `path` up to the first id that is not a byte."""
    whole = next((at for at, token in enumerate(path) if token < BYTE_OFFSET), len(path))
    return bytes(token - BYTE_OFFSET for token in path[:whole])
