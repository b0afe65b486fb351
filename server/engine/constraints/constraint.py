"""What one completion may hold: strict UTF-8, a grammar, or both, id by id (docs/design.md §9)."""

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
    """The state of one request: a function of the ids its completion has, whatever has been drafted or preempted.

    Masks concern only what the output may go on with: where nothing can come of a byte (behind a draft that will be
    refused, behind the end) there is none. A mask that is there allows at least one id that is produced.

    A grammar's masks come when its process has made them. Until then it is `undecided` whether the completion goes on.
    """

    def __init__(self, max_tokens: int, *, strict: bool, grammar: GrammarCursor | None) -> None:
        self._left = self._max_tokens = max_tokens
        self._strict = strict
        self._utf8 = utf8.WHOLE
        self.grammar = grammar
        #: Whether `decide` is to be asked how the completion goes on.
        self.undecided = grammar is not None
        #: Why it said FinishReason.ERROR.
        self.problem: str | None = None
        self.problem_code = ErrorCode.GRAMMAR_TOO_COMPLEX

    @classmethod
    def of(cls, params: SamplingParams, pool: GrammarPool, *, wait: bool = True) -> Constraint | None:
        """None where the request asks for nothing of the kind.

        With `wait` the grammar is compiled before this returns: raises InvalidRequestError if it cannot be used.
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
        """Wait for the grammar to be compiled. Raises InvalidRequestError if it cannot be used, or not here."""
        if self.grammar is None:
            return
        while self.grammar.waiting:
            pool.poll(1.0)
        if self.grammar.failure is not None:
            raise InvalidRequestError(self.grammar.failure, "structured_outputs")
        if self.decide() is not None:
            raise InvalidRequestError(self.problem or "the grammar allows no byte", "max_tokens")

    def commit(self, token: int) -> FinishReason | None:
        """One more byte stands in the output; says so where nothing can follow it, if that is known yet."""
        self._left -= 1
        if self._strict:
            self._utf8 = utf8.step(self._utf8, token)
        if self.grammar is None:
            return None
        self.grammar.commit(token)
        self.undecided = self.grammar.waiting
        return None if self.undecided else self.decide()

    def decide(self) -> FinishReason | None:
        """How a completion ends behind whose last byte nothing can follow, now that the grammar's process has answered.

        A grammar that allows nothing more ends the completion, whatever `min_tokens` and `ignore_eos` say: there is no
        byte to go on with. LENGTH: the next character of the grammar does not fit into what is left; an ERROR if it is
        the first.
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
        """Whether `along` and `block` would know all that a pass asks of them; what they lack is asked for."""
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
        """What may follow the output, and the output with the first, second, ... of the draft: len(draft) + 1 masks."""
        masks: list[Mask] = [None] * (len(draft) + 1)
        if self.grammar is not None:
            for at, allowed in enumerate(self.grammar.along(draft)):
                masks[at] = allowed if _some_byte(allowed) else None
        if self._strict:
            state = self._utf8
            for at in range(len(masks)):
                if self.grammar is None or masks[at] is not None:
                    both = _both(masks[at], self._room(state, at))
                    # None where a draft has come to an end.
                    masks[at] = both if both is None or _some_byte(both) else None
                if at < len(draft):
                    state = utf8.step(state, draft[at])
        return masks

    def block(self, ids: Sequence[int], draft: Sequence[int] = ()) -> BlockConstraint:
        """A walk over a block that follows the output and a draft: its ids, [MASK] where they are open."""
        state = self._utf8
        for token in draft:
            state = utf8.step(state, token)
        paths = utf8.BlockPaths(state, self._left - len(draft), ids) if self._strict else None
        return BlockConstraint(paths, self.grammar, draft)

    def _room(self, state: int, drafted: int) -> Mask:
        return utf8.allowed(state, self._left - drafted) if self._strict else None

    def _fits(self, allowed: np.ndarray) -> bool:
        """Whether strict UTF-8 has room for a byte that the grammar goes on with."""
        both = _both(allowed, self._room(self._utf8, 0))
        return both is not None and _some_byte(both)


class BlockConstraint:
    """What may stand at a block's positions, one after another.

    A grammar says so up to the first open one, or to where its masks take longer than a step may wait: what a draft has
    there is then refused.
    """

    def __init__(self, paths: utf8.BlockPaths | None, grammar: GrammarCursor | None, draft: Sequence[int] = ()) -> None:
        self._paths = paths
        self._grammar = grammar
        self._ids: list[int] = list(draft)
        #: What was likely to stand there when the grammar was last asked, and its masks along that.
        self._path: Sequence[int] = ()
        self._masks: list[np.ndarray] = []

    def allowed(self, ahead: Sequence[int] = ()) -> Mask:
        """What may stand at the next position. What is likely to be taken there and after it saves asking again."""
        mask = None if self._paths is None else self._paths.allowed()
        if mask is not None and not _some_byte(mask):
            # Behind a draft that came to an end: nothing can come of the block.
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
        """Go on to the position after it, where `token` stands ([MASK]: nothing yet)."""
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
