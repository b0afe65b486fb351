"""Decides where a completion ends (EOS, stop ids, stop strings, grammar, length) and which bytes may be sent."""

from __future__ import annotations

from collections.abc import Sequence

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID
from fastblt.server.engine.constraints.constraint import Constraint
from fastblt.server.engine.stop_strings import stop_strings
from fastblt.server.request import ByteLogprobs, FinishReason, SamplingParams


class Output:
    """The completion of one request as it grows.

    Bytes that may still become part of a stop string are held back. Ids after the end are not taken. The caller counts
    them as wasted.
    """

    def __init__(self, params: SamplingParams, constraint: Constraint | None = None) -> None:
        self._params = params
        self._constraint = constraint
        self._stop_ids = set(params.stop_token_ids)
        self._stops = stop_strings(params.stop)
        #: The state of `StopStrings` after the output so far.
        self._state = 0
        #: Whether only EOS and the length can end the completion, and there are no logprobs.
        self._simple = not params.stop and not self._stop_ids and constraint is None and params.logprobs is None
        self.ids: list[int] = []
        #: Log-probabilities of the bytes that have not been released.
        self._logprobs: list[ByteLogprobs] = []
        #: How many ids have been returned by `release` or `pass_on`.
        self.released = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        #: The id that ended the completion without being part of it, and its logprobs.
        self.ending: tuple[int, ByteLogprobs] | None = None

    def pass_on(self, ids: Sequence[int]) -> bool:
        """Take and release fixed ids at once in the simple case. Returns False, without effect, in any other case."""
        params, own = self._params, self.ids
        if not self._simple or len(own) + len(ids) >= params.max_tokens or (EOS_ID in ids and not params.ignore_eos):
            return False
        own += ids
        self.released = len(own)
        return True

    def extend(self, ids: Sequence[int], logprobs: list[ByteLogprobs] | None) -> int:
        """Take fixed ids up to the one that ends the completion. Returns how many were taken."""
        for at, token in enumerate(ids):
            if self.append(token, logprobs[at] if logprobs else None):
                return at + 1
        return len(ids)

    def append(self, token: int, logprob: ByteLogprobs | None) -> bool:
        """Take one fixed id. Returns whether the completion has ended; then it must not be called again."""
        params = self._params
        may_stop = len(self.ids) >= params.min_tokens
        if token == EOS_ID and not params.ignore_eos:
            self._end_at(token, logprob)
            return self._finish(FinishReason.STOP, None)
        if token in self._stop_ids and may_stop:
            if params.include_stop_str_in_output:
                self._push(token, logprob)
            else:
                self._end_at(token, logprob)
            return self._finish(FinishReason.STOP, token)
        self._push(token, logprob)
        if (stops := self._stops) is not None:
            # EOS under ignore_eos is not a byte, so no stop string goes across it.
            self._state = stops.step(self._state, token - BYTE_OFFSET) if token >= BYTE_OFFSET else 0
            if self._state and len(self.ids) >= params.min_tokens and (stop := stops.ended(self._state)) is not None:
                # `ended` gives the longest stop string that ends here, which is the one that began first.
                if not params.include_stop_str_in_output:
                    del self.ids[-len(stop) :]
                    del self._logprobs[-len(stop) :]
                return self._finish(FinishReason.STOP, stop.decode("utf-8", "replace"))
        if self._constraint is not None:
            if (end := self._constraint.commit(token)) is not None:
                return self._finish(end, None)
            if self._constraint.undecided:
                return False
        if len(self.ids) >= params.max_tokens:
            return self._finish(FinishReason.LENGTH, None)
        return False

    def decide(self) -> bool:
        """Finish the last `append` once the constraint is decided. Returns whether the completion has ended."""
        assert self._constraint is not None
        if (end := self._constraint.decide()) is not None:
            return self._finish(end, None)
        return len(self.ids) >= self._params.max_tokens and self._finish(FinishReason.LENGTH, None)

    def release(self) -> tuple[list[int], list[ByteLogprobs]]:
        """The ids, and logprobs if asked for, that may be sent and have not been returned yet."""
        until = len(self.ids)
        if self.finish_reason is None and self._stops is not None and not self._params.include_stop_str_in_output:
            until -= self._stops.begun(self._state)
        start, self.released = self.released, max(self.released, until)
        count = self.released - start
        values, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        return self.ids[start : self.released], values

    def _push(self, token: int, logprob: ByteLogprobs | None) -> None:
        self.ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)

    def _end_at(self, token: int, logprob: ByteLogprobs | None) -> None:
        if logprob is not None:
            self.ending = (token, logprob)

    def _finish(self, reason: FinishReason, stop: str | int | None) -> bool:
        self.finish_reason, self.stop_reason = reason, stop
        return True
