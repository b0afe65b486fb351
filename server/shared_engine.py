"""One engine for several callers in one process: overlapping streams, threads, interrupts.

A caller that waits for bytes runs a step of the engine and distributes its deltas to all callers. A lock lets one
caller step at a time. An interrupt (Ctrl-C) is delayed until the step ends, so that no step is left half done.
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
        # Not reentrant: a generator that is garbage-collected during a step must not begin another step.
        self._lock = threading.Lock()
        #: Deltas that their caller has not fetched yet, by request id.
        self._inboxes: dict[str, deque[Delta]] = {}
        #: Requests to abort, because their caller has gone. Appending is safe from any thread at any time.
        self._abandoned: deque[str] = deque()
        self._pid = os.getpid()

    def run(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """The deltas of `requests` as they arrive. Closing the iterator early aborts the unfinished requests.

        Raises InvalidRequestError for a request that can never be served, QueueFullError if the queue has no room and
        none of `requests` is running, RuntimeError in a forked child.
        """
        queued = deque(requests)
        inbox: deque[Delta] = deque()
        unfinished: set[str] = set()
        try:
            while queued or unfinished:
                # A step may give no deltas, or deltas for other callers only.
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
            # This caller's unfinished requests will make room later. Without any, it cannot count on room.
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
        """Abort requests: at once if no step is running, or else at the start of the next one."""
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
        """Hold the engine for this thread, and delay interrupts until the end."""
        # Before the lock: in a forked child, a thread that does not exist there may hold it for ever.
        self._check_process()
        with self._lock:
            if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
                # Only the main thread gets interrupts, and a handler set outside of Python is left alone.
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
