"""Per-request output stream from the engine client to an HTTP handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from fastblt.server.request import Delta, FinishReason, Request

#: Least seconds between two items of a stream. Each costs a write to a socket, and bytes come faster than anybody
#: reads.
ITEM_SECONDS = 0.02

#: Streams release items at multiples of so many seconds, many of them at once: waking the process for each would take
#: more time from the engine than the writes do.
_TICK_SECONDS = 0.005


class DeltaStream:
    """Asynchronous iterator over the deltas of requests that were submitted together. It has one reader, which may
    also `listen` and take items as they come.

    Each item is a list with at most one delta a request: what came since the last item is merged, so a slow reader
    holds no more than the requests' outputs. The first item and the last come at once, the others no closer together
    than ITEM_SECONDS. With `whole`, deltas are held back until every request has ended, or one has failed. A reader
    that stops before the end must `close()`, which aborts what is unfinished.
    """

    def __init__(self, abort: Callable[[str, str], None], requests: Sequence[Request], *, whole: bool = False) -> None:
        self._abort = abort
        self._open = {request.request_id for request in requests}
        self._pending: dict[str, Delta] = {}
        self._event = asyncio.Event()
        self._wake: Callable[[], None] = self._event.set
        self._whole = whole
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._failed = False
        self._logprob_bytes = sum(request.logprob_bytes for request in requests)

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> list[Delta]:
        while not (deltas := self.take()):
            if self.ended:
                raise StopAsyncIteration
            self._event.clear()
            await self._event.wait()
        return deltas

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Have `on_ready` called, instead of the iterator woken, whenever there may be something to take or the end has
        come. It must not raise.
        """
        self._wake = on_ready

    def take(self) -> list[Delta]:
        """The next item, if it may leave already; else nothing."""
        if not self._pending or self._held:
            return []
        deltas, self._pending = self._pending, {}
        self._next = math.ceil((self._loop.time() + ITEM_SECONDS) / _TICK_SECONDS) * _TICK_SECONDS
        return list(deltas.values())

    @property
    def ended(self) -> bool:
        """Whether nothing is left to take, and nothing will be."""
        return self._closed or not (self._open or self._pending)

    @property
    def logprob_bytes(self) -> int:
        """Memory that log-probabilities may come to take here until they are read."""
        return 0 if self.ended else self._logprob_bytes

    @property
    def _held(self) -> bool:
        return bool(self._open) and not self._failed and (self._whole or self._loop.time() < self._next)

    def push(self, delta: Delta) -> None:
        """Take over a delta. After `close` it is dropped."""
        if delta.finish_reason is not None:
            self._open.discard(delta.request_id)
            self._failed |= delta.finish_reason is FinishReason.ERROR
        if self._closed:
            return
        earlier = self._pending.get(delta.request_id)
        self._pending[delta.request_id] = delta if earlier is None else _merge(earlier, delta)
        if not self._held:
            self._wake()
        elif not self._whole and self._timer is None:
            self._timer = self._loop.call_at(self._next, self._release)

    def _release(self) -> None:
        self._timer = None
        self._next = 0.0
        self._wake()

    def close(self) -> None:
        """End the iteration and abort the requests that have not finished. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._pending.clear()
        for request_id in self._open:
            self._abort(request_id, "sibling_failed" if self._failed else "client_left")
        self._wake()


def _merge(earlier: Delta, later: Delta) -> Delta:
    """`later` put behind `earlier`, whose lists are reused: joining copies would cost the square of the output."""
    earlier.ids.extend(later.ids)
    if earlier.logprobs is None:
        earlier.logprobs = later.logprobs
    else:
        earlier.logprobs.extend(later.logprobs or ())
    earlier.ending = later.ending
    earlier.finish_reason = later.finish_reason
    earlier.stop_reason = later.stop_reason
    earlier.error = later.error
    earlier.error_code = later.error_code
    earlier.ledger = later.ledger
    earlier.timings = later.timings
    earlier.decoding = later.decoding
    earlier.patches = later.patches
    if earlier.rounds is not None:
        earlier.rounds.extend(later.rounds or ())
    earlier.cached = later.cached
    return earlier
