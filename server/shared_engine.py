"""One engine for several callers of one process: overlapping streams, threads, interrupts.

Whoever waits for bytes takes a step of the engine and hands out what it gave to everybody. A lock lets one caller
step at a time, and an interrupt (Ctrl-C) waits for the end of a step, so that the engine is never left in the middle.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fastblt.server.engine.engine import Engine
from fastblt.server.request import Delta, QueueFullError, Request


class SharedEngine:
    """Runs requests of several callers in one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # Not reentrant: a generator that is garbage-collected within a step must not begin another.
        self._lock = threading.Lock()
        #: Deltas that their caller has not fetched yet, by request id.
        self._inboxes: dict[str, deque[Delta]] = {}
        #: Requests that nobody waits for any more. Appending is safe in every thread and at any time.
        self._abandoned: deque[str] = deque()
        self._pid = os.getpid()

    def run(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """The deltas of `requests` as they come. Ending the iterator early aborts those that have not finished.

        Raises InvalidRequestError for one that can never be served, QueueFullError if not one finds room in the queue,
        RuntimeError in a forked child.
        """
        queued = deque(requests)
        inbox: deque[Delta] = deque()
        unfinished: set[str] = set()
        try:
            while queued or unfinished:
                # A step can give nothing: the others' bytes, or none.
                while not inbox and (queued or unfinished):
                    with self._stepping():
                        self._enqueue(queued, unfinished, inbox)
                        if not inbox:
                            self._step()
                while inbox:
                    delta = inbox.popleft()
                    if delta.finish_reason is not None:
                        unfinished.discard(delta.request_id)
                        self._inboxes.pop(delta.request_id, None)
                    yield delta
        finally:
            self._abandon(unfinished)

    def _enqueue(self, queued: deque[Request], unfinished: set[str], inbox: deque[Delta]) -> None:
        try:
            while queued:
                self.engine.add(queued[0])
                unfinished.add(queued[0].request_id)
                self._inboxes[queued.popleft().request_id] = inbox
        except QueueFullError:
            # One's own requests make room in time; if there are none, others' may not.
            if not unfinished:
                raise

    def _step(self) -> None:
        while self._abandoned:
            request_id = self._abandoned.popleft()
            self._inboxes.pop(request_id, None)
            self.engine.abort(request_id)
        for delta in self.engine.step():
            inbox = self._inboxes.get(delta.request_id)
            if inbox is not None:
                inbox.append(delta)

    def _abandon(self, request_ids: set[str]) -> None:
        """Abort requests: at once if nobody is in a step, or else with the next one."""
        if not request_ids or os.getpid() != self._pid:
            return
        self._abandoned.extend(request_ids)
        if self._lock.acquire(blocking=False):
            try:
                self._step()
            finally:
                self._lock.release()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this LLM was made before a fork, and its threads are not in the child: make the LLM in the child, or "
                "start the child with multiprocessing's 'spawn'"
            )

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """The engine for this thread alone, and an interrupt held back until the end."""
        # Before the lock: a thread that the child does not have may hold it for ever.
        self._check_process()
        with self._lock:
            if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
                # Interrupts are the main thread's, and a handler that is not Python's is left alone.
                yield
                return
            interrupts: list[tuple[int, FrameType | None]] = []
            handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append((number, frame)))
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, handler)
        if interrupts and callable(handler):
            handler(*interrupts[0])
