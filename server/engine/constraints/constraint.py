"""What one completion may hold: strict UTF-8, a grammar, or both, id by id (docs/design.md §9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID
from fastblt.server.engine.constraints import utf8
from fastblt.server.engine.constraints.grammar import GrammarError, Grammars, GrammarState
from fastblt.server.request import FinishReason, InvalidRequestError, SamplingParams, Utf8

#: bool [260]; None forbids nothing.
Mask = np.ndarray | None


class Constraint:
    """The state of one request: a function of the ids its completion has, whatever has been drafted or preempted.

    Masks concern only what the output may go on with: where nothing can come of a byte (behind a draft that will be
    refused, behind the end) there is none. A mask that is there allows at least one id that is produced.
    """

    def __init__(self, max_tokens: int, *, strict: bool, grammar: GrammarState | None) -> None:
        self._left = max_tokens
        self._strict = strict
        self._utf8 = utf8.WHOLE
        self._grammar = grammar
        #: Why `commit` said FinishReason.ERROR.
        self.problem: str | None = None

    @classmethod
    def of(cls, params: SamplingParams, grammars: Grammars) -> Constraint | None:
        """None where the request asks for nothing of the kind. Raises InvalidRequestError."""
        strict = params.utf8 == Utf8.STRICT
        if not strict and params.structured_output is None:
            return None
        grammar = None if params.structured_output is None else grammars.start(params.structured_output)
        constraint = cls(params.max_tokens, strict=strict, grammar=grammar)
        if not constraint._fits():
            raise InvalidRequestError("no character that the grammar begins with fits into max_tokens", "max_tokens")
        return constraint

    def commit(self, token: int) -> FinishReason | None:
        """One more byte stands in the output; says so where nothing can follow it.

        A grammar that allows nothing more ends the completion, whatever `min_tokens` and `ignore_eos` say: there is no
        byte to go on with. LENGTH: the next character of the grammar does not fit into what is left.
        """
        self._left -= 1
        if self._strict:
            self._utf8 = utf8.step(self._utf8, token)
        if self._grammar is None:
            return None
        try:
            self._grammar.commit(token)
        except GrammarError as error:
            self.problem = f"the grammar became too complex: {error}"
            return FinishReason.ERROR
        allowed = self._grammar.allowed
        if not _some_byte(allowed):
            if allowed[EOS_ID]:
                return FinishReason.STOP
            self.problem = "the grammar has come to a place where no byte satisfies it"
            return FinishReason.ERROR
        return None if self._left == 0 or self._fits() else FinishReason.LENGTH

    def along(self, draft: Sequence[int]) -> list[Mask]:
        """What may follow the output, and the output with the first, second, ... of the draft: len(draft) + 1 masks."""
        masks: list[Mask] = [None] * (len(draft) + 1)
        if self._grammar is not None:
            for at, allowed in enumerate(self._grammar.along(draft)):
                masks[at] = allowed if _some_byte(allowed) else None
        if self._strict:
            state = self._utf8
            for at in range(len(masks)):
                if self._grammar is None or masks[at] is not None:
                    both = _both(masks[at], self._room(state, at))
                    # None where a draft has come to an end.
                    masks[at] = both if both is None or _some_byte(both) else None
                if at < len(draft):
                    state = utf8.step(state, draft[at])
        return masks

    def block(self, ids: Sequence[int]) -> BlockConstraint:
        """A walk over a block that follows the output: its ids, [MASK] where they are open."""
        paths = utf8.BlockPaths(self._utf8, self._left, ids) if self._strict else None
        return BlockConstraint(paths, self._grammar)

    def _room(self, state: int, drafted: int) -> Mask:
        return utf8.allowed(state, self._left - drafted) if self._strict else None

    def _fits(self) -> bool:
        """Whether the grammar goes on with a byte that strict UTF-8 has room for."""
        if self._grammar is None:
            return True
        both = _both(self._grammar.allowed, self._room(self._utf8, 0))
        return both is not None and _some_byte(both)


class BlockConstraint:
    """What may stand at a block's positions, one after another.

    A grammar says so up to the first open one.
    """

    def __init__(self, paths: utf8.BlockPaths | None, grammar: GrammarState | None) -> None:
        self._paths = paths
        self._grammar = grammar
        self._ids: list[int] = []

    def allowed(self) -> Mask:
        """What may stand at the next position."""
        mask = None if self._paths is None else self._paths.allowed()
        if self._grammar is None:
            return mask
        masks = self._grammar.along(self._ids)
        both = _both(masks[-1], mask) if len(masks) > len(self._ids) else mask
        return both if both is not None and _some_byte(both) else mask

    def take(self, token: int) -> None:
        """Go on to the position after it, where `token` stands ([MASK]: nothing yet)."""
        if self._paths is not None:
            self._paths.take(token)
        if token == MASK_ID:
            self._grammar = None
        self._ids.append(token)


def _both(one: Mask, other: Mask) -> Mask:
    if one is None or other is None:
        return other if one is None else one
    both: np.ndarray = one & other
    return both


def _some_byte(mask: np.ndarray) -> bool:
    return bool(mask[BYTE_OFFSET:].any())
