"""Constrained decoding of one completion: strict UTF-8, a grammar, or both, as masks of ids (docs/design.md §9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID
from fastblt.server.engine.constraints import utf8
from fastblt.server.engine.constraints.cursor import GrammarCursor
from fastblt.server.engine.constraints.grammar_pool import GrammarPool
from fastblt.server.request import ErrorCode, FinishReason, InvalidRequestError, SamplingParams, Utf8

#: bool [260]; None forbids nothing.
Mask = np.ndarray | None


class Constraint:
    """The constraint state of one request. It depends only on the ids of its completion, not on drafts or preemption.

    A mask is given only where a byte can become part of the output. After a draft that will be refused, and after the
    end, there is none. A mask always allows at least one id that can be produced.

    A grammar's masks are made by another process. Until they arrive, it is `undecided` whether the completion goes on.
    """

    def __init__(self, max_tokens: int, *, strict: bool, grammar: GrammarCursor | None) -> None:
        self._left = self._max_tokens = max_tokens
        self._strict = strict
        self._utf8 = utf8.WHOLE
        self.grammar = grammar
        #: Whether `decide` must still be called after the last byte.
        self.undecided = grammar is not None
        #: The error message if the completion ended with FinishReason.ERROR.
        self.problem: str | None = None
        self.problem_code = ErrorCode.GRAMMAR_TOO_COMPLEX

    @classmethod
    def of(cls, params: SamplingParams, pool: GrammarPool, *, wait: bool = True) -> Constraint | None:
        """The constraint of a request; None if it asks for neither strict UTF-8 nor a grammar.

        With `wait` the grammar is compiled before this returns. Raises InvalidRequestError if it cannot be used.
        """
        strict = params.utf8 == Utf8.STRICT
        if not strict and params.structured_output is None:
            return None
        grammar = None if params.structured_output is None else pool.start(params.structured_output)
        constraint = cls(params.max_tokens, strict=strict, grammar=grammar)
        if wait:
            try:
                constraint._check(pool)
            except InvalidRequestError:
                constraint.close()
                raise
        return constraint

    def _check(self, pool: GrammarPool) -> None:
        """Wait until the grammar is compiled. Raises InvalidRequestError if it cannot be used with this request."""
        if self.grammar is None:
            return
        while self.grammar.waiting:
            pool.poll(1.0)
        if self.grammar.failure is not None:
            raise InvalidRequestError(self.grammar.failure, "structured_outputs")
        if self.decide() is not None:
            raise InvalidRequestError(self.problem or "the grammar allows no byte", "max_tokens")

    def commit(self, token: int) -> FinishReason | None:
        """Append one id to the output. Returns why the completion ends if nothing can follow, and None otherwise.

        Also returns None while that is not known: see `undecided`.
        """
        self._left -= 1
        if self._strict:
            self._utf8 = utf8.step(self._utf8, token)
        if self.grammar is None:
            return None
        self.grammar.commit(token)
        self.undecided = self.grammar.waiting
        return None if self.undecided else self.decide()

    def decide(self) -> FinishReason | None:
        """Why the completion ends after its last byte, or None if it goes on. The grammar's process has answered.

        STOP: the grammar allows no further byte. This holds whatever `min_tokens` and `ignore_eos` say, since there is
        no byte to go on with. LENGTH: the grammar's next character does not fit into `max_tokens`; if it is the first
        one, ERROR. See `problem` for errors.
        """
        assert self.grammar is not None and not self.grammar.waiting
        self.undecided = False
        if self.grammar.failure is not None:
            self.problem = self.grammar.failure
            if not self.grammar.refused:
                self.problem = f"the grammar became too complex: {self.problem}"
            return FinishReason.ERROR
        allowed = self.grammar.allowed
        assert allowed is not None
        if not _some_byte(allowed):
            if allowed[EOS_ID]:
                return FinishReason.STOP
            self.problem = "the grammar has come to a place where no byte satisfies it"
            return FinishReason.ERROR
        if not self._strict or self._left == 0 or self._fits(allowed):
            return None
        if self._left < self._max_tokens:
            return FinishReason.LENGTH
        self.problem = "no character that the grammar begins with fits into max_tokens"
        self.problem_code = ErrorCode.NOTHING_LEFT
        return FinishReason.ERROR

    def ready(self, draft: Sequence[int], block: Sequence[int]) -> bool:
        """Whether `along` and `block` have all masks that a pass needs. Requests the missing ones."""
        if self.grammar is None:
            return True
        if self.undecided:
            return False
        if block:
            draft = block[: block.index(MASK_ID)] if MASK_ID in block else block
        return self.grammar.ready(draft)

    @property
    def followed(self) -> bool:
        """Whether a process has to say how the completion goes on."""
        return self.grammar is not None and self.grammar.failure is None and not self.grammar.on_the_spot

    def close(self) -> None:
        """The completion has ended."""
        if self.grammar is not None:
            self.grammar.close()

    def along(self, draft: Sequence[int]) -> list[Mask]:
        """len(draft) + 1 masks: mask i says what may follow the output and the first i ids of the draft."""
        masks: list[Mask] = [None] * (len(draft) + 1)
        if self.grammar is not None:
            for at, allowed in enumerate(self.grammar.along(draft)):
                masks[at] = allowed if _some_byte(allowed) else None
        if self._strict:
            state = self._utf8
            for at in range(len(masks)):
                if self.grammar is None or masks[at] is not None:
                    both = _both(masks[at], self._room(state, at))
                    # No mask where the draft has ended the output.
                    masks[at] = both if both is None or _some_byte(both) else None
                if at < len(draft):
                    state = utf8.step(state, draft[at])
        return masks

    def block(self, ids: Sequence[int], draft: Sequence[int] = ()) -> BlockConstraint:
        """A walk over the positions of a block that follows the output and `draft`. Open positions have MASK_ID."""
        state = self._utf8
        for token in draft:
            state = utf8.step(state, token)
        paths = utf8.BlockPaths(state, self._left - len(draft), ids) if self._strict else None
        return BlockConstraint(paths, self.grammar, draft)

    def _room(self, state: int, drafted: int) -> Mask:
        return utf8.allowed(state, self._left - drafted) if self._strict else None

    def _fits(self, allowed: np.ndarray) -> bool:
        """Whether some id of `allowed` also satisfies strict UTF-8 within the bytes that are left."""
        both = _both(allowed, self._room(self._utf8, 0))
        return both is not None and _some_byte(both)


class BlockConstraint:
    """Masks for the positions of a block, from left to right.

    The grammar's masks end at the first open position, or where they take longer than a step may wait. After that only
    UTF-8 applies. A byte that breaks the grammar there is refused when the block is verified.
    """

    def __init__(self, paths: utf8.BlockPaths | None, grammar: GrammarCursor | None, draft: Sequence[int] = ()) -> None:
        self._paths = paths
        self._grammar = grammar
        self._ids: list[int] = list(draft)
        #: The ids that were expected when the grammar was last asked, and the masks along them.
        self._path: Sequence[int] = ()
        self._masks: list[np.ndarray] = []

    def allowed(self, ahead: Sequence[int] = ()) -> Mask:
        """The mask of the next position. `ahead` are the ids expected from there on: if right, they save requests."""
        mask = None if self._paths is None else self._paths.allowed()
        if mask is not None and not _some_byte(mask):
            # The draft has ended the output, so the block is dropped.
            mask = None
        if self._grammar is None:
            return mask
        at = len(self._ids)
        if not self._masks:
            self._path = [*self._ids, *ahead]
            if not self._grammar.reach(self._path):
                self._grammar = None
                return mask
            self._masks = self._grammar.along(self._path)
        both = _both(self._masks[at], mask) if at < len(self._masks) else mask
        return both if both is not None and _some_byte(both) else mask

    def take(self, token: int) -> None:
        """Record the id of the next position (MASK_ID if it stays open) and move past it."""
        if self._paths is not None:
            self._paths.take(token)
        if token == MASK_ID:
            self._grammar = None
        if len(self._ids) >= len(self._path) or self._path[len(self._ids)] != token:
            self._masks = []
        self._ids.append(token)


def _both(one: Mask, other: Mask) -> Mask:
    if one is None or other is None:
        return other if one is None else one
    both: np.ndarray = one & other
    return both


def _some_byte(mask: np.ndarray) -> bool:
    return bool(mask[BYTE_OFFSET:].any())
