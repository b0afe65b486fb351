"""Runs an engine in a thread of its own and speaks to it from an event loop.

The engine belongs to its thread: it is loaded, fed and stepped there and nowhere else. The loop sends it commands
through an inbox (an idle engine blocks on it) and hears back through one `call_soon_threadsafe` a step. All other state
here belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from server.request import Delta, FinishReason, InvalidRequestError, QueueFullError, Request
from server.settings import EngineSettings

if TYPE_CHECKING:
    # At run time the engine is imported in its thread: importing torch takes seconds.
    from models.config import BltConfig
    from server.engine.engine import Engine
    from server.engine.stats import EngineStats

logger = logging.getLogger("fastblt.engine")

#: Seconds that a stopping engine may take to end a pass, or to finish loading.
JOIN_SECONDS = 30.0


class EngineState(StrEnum):
    """Where an engine stands; requests are taken in READY only."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineUnavailableError(RuntimeError):
    """The engine takes no request: it loads, drains or is dead. `state` says which, the message why."""

    def __init__(self, state: EngineState, message: str) -> None:
        super().__init__(message)
        self.state = state


class Observer(Protocol):
    """Told of every delta, also when its reader has left. `since` is when the request last had bytes, or arrived."""

    def __call__(self, request: Request, delta: Delta, since: float, now: float) -> None: ...


class EngineClient:
    """One engine, its thread, and the requests alive in it.

    `name` is the model's id for users, the engine's own by default. `load` makes the engine, in its thread.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        name: str | None = None,
        load: Callable[[EngineSettings], Engine] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.observer = observer
        self.state = EngineState.LOADING
        self.reason = "the model is loading"
        self._name = name
        self._load = load or _load_engine
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._verdicts: dict[asyncio.Future[None], Sequence[Request]] = {}
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        # A daemon, so that a pass that never ends cannot keep a stopped process alive.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def loaded(self) -> bool:
        """Whether the engine was ever ready."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The loaded engine, for reading its facts. Raises EngineUnavailableError unless it is usable."""
        if self._engine is None or self.state not in (EngineState.READY, EngineState.DRAINING):
            raise EngineUnavailableError(self.state, self.reason)
        return self._engine

    @property
    def model_name(self) -> str:
        return self._name or self.engine.model_name

    @property
    def config(self) -> BltConfig:
        return self.engine.config

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters. Raises EngineUnavailableError before it is loaded."""
        if self._engine is None:
            raise EngineUnavailableError(self.state, self.reason)
        return self._engine.stats()

    async def start(self) -> None:
        """Begin to load, in the engine's thread; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def ready(self) -> None:
        """Wait until the engine is loaded. Raises EngineUnavailableError if it cannot be, or was stopped."""
        while self.state is EngineState.LOADING:
            await self._wait_change()
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(self.state, self.reason)

    async def submit(self, *requests: Request) -> DeltaStream:
        """Hand requests to the engine, all or none, and return the stream of their deltas.

        Raises InvalidRequestError or QueueFullError when the engine refuses one of them, EngineUnavailableError when it
        is not ready.
        """
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(self.state, self.reason)
        bound = self.settings.max_waiting
        if len(requests) > bound:
            raise InvalidRequestError(f"{len(requests)} completions were asked for; the queue holds {bound}", "n")
        undecided = sum(len(waiting) for waiting in self._verdicts.values())
        if undecided + len(requests) > bound:
            raise QueueFullError(f"the waiting queue holds {bound} requests")
        stream = DeltaStream(self.abort, requests)
        for request in requests:
            self._live[request.request_id] = _Live(request, stream, request.arrival)
        verdict: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._verdicts[verdict] = requests
        self._inbox.put(partial(self._admit, requests, verdict))
        try:
            await verdict
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ask the engine to end a request; its stream ends with FinishReason.ABORT. Unknown ids are ignored."""
        self._inbox.put(lambda engine: engine.abort(request_id))

    async def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests, give those that run `timeout` seconds, abort what is left, and end the thread."""
        if self.state in (EngineState.LOADING, EngineState.READY):
            self._become(EngineState.DRAINING, "the server is shutting down")
            await self._drain(timeout)
            for request_id in self._live:
                self.abort(request_id)
        self._inbox.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
        if self.state is not EngineState.DEAD:
            self._become(EngineState.STOPPED, "the server has shut down")
        self._fail_all(FinishReason.ABORT, "the server has shut down")

    # --- in the engine's thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            engine = self._load(self.settings)
        except BaseException as error:
            logger.debug("loading failed", exc_info=True)
            self._post(self._die, f"{error or type(error).__name__}")
            return
        self._post(self._loaded, engine)
        try:
            while self._obey(engine):
                deltas = engine.step()
                if deltas:
                    self._post(self._deliver, deltas)
        except BaseException as error:
            logger.exception("the engine failed")
            self._post(self._die, f"the engine failed: {type(error).__name__}")

    def _obey(self, engine: Engine) -> bool:
        """Carry out the commands that wait, or the next one if there is no work. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=not engine.has_work())
            except queue.Empty:
                return True
            if command is None:
                # What was aborted just before still has its last deltas to come.
                if engine.has_work() and (deltas := engine.step()):
                    self._post(self._deliver, deltas)
                return False
            command(engine)

    def _admit(self, requests: Sequence[Request], verdict: asyncio.Future[None], engine: Engine) -> None:
        problem: Exception | None = None
        for done, request in enumerate(requests):
            try:
                engine.add(request)
            except Exception as error:
                if not isinstance(error, InvalidRequestError | QueueFullError):
                    logger.exception("a request could not be added")
                for earlier in requests[:done]:
                    engine.abort(earlier.request_id)
                problem = error
                break
        self._post(self._decide, verdict, problem)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            logger.debug("the event loop is closed; nobody hears the engine")

    # --- in the event loop ------------------------------------------------------------------------------------------

    def _loaded(self, engine: Engine) -> None:
        self._engine = engine
        if self.state is EngineState.LOADING:
            self._become(EngineState.READY, "")

    def _decide(self, verdict: asyncio.Future[None], problem: Exception | None) -> None:
        requests = self._verdicts.pop(verdict, ())
        if problem is not None:
            for request in requests:
                self._live.pop(request.request_id, None)
        if verdict.done():
            return
        if problem is None:
            verdict.set_result(None)
        else:
            verdict.set_exception(problem)

    def _deliver(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            if self.observer is not None:
                self.observer(live.request, delta, live.since, now)
            if delta.ids:
                live.since = now
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
            live.stream.push(delta)
        if not self._live:
            self._changed.set()

    def _die(self, reason: str) -> None:
        if self.state is EngineState.STOPPED:
            return
        self._become(EngineState.DEAD, reason)
        self._fail_all(FinishReason.ERROR, reason)

    def _fail_all(self, finish: FinishReason, reason: str) -> None:
        """Give every request that still waits for the engine its last word."""
        for verdict in list(self._verdicts):
            self._decide(verdict, EngineUnavailableError(self.state, reason))
        self._deliver([Delta(request_id, finish_reason=finish, error=reason) for request_id in self._live])

    def _become(self, state: EngineState, reason: str) -> None:
        self.state = state
        self.reason = reason
        self._changed.set()

    async def _wait_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _drain(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while self._live:
                    await self._wait_change()
        except TimeoutError:
            logger.warning("%d requests did not finish in time and are aborted", len(self._live))


class DeltaStream:
    """Asynchronous iterator over the news of requests that were submitted together; one reader.

    Each item is a list with at most one delta a request: what came since the last item is merged, so a slow reader
    holds no more than the requests' outputs. Whoever stops before the end must `close()`: it aborts what is unfinished.
    """

    def __init__(self, abort: Callable[[str], None], requests: Sequence[Request]) -> None:
        self._abort = abort
        self._open = {request.request_id for request in requests}
        self._news: dict[str, Delta] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> list[Delta]:
        while not self._news:
            if self._closed or not self._open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        news, self._news = self._news, {}
        return list(news.values())

    def push(self, delta: Delta) -> None:
        """Take over a delta. After `close` it is dropped."""
        if delta.finish_reason is not None:
            self._open.discard(delta.request_id)
        if self._closed:
            return
        earlier = self._news.get(delta.request_id)
        self._news[delta.request_id] = delta if earlier is None else _merge(earlier, delta)
        self._wake.set()

    def close(self) -> None:
        """End the iteration and abort the requests that have not finished. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._news.clear()
        for request_id in self._open:
            self._abort(request_id)
        self._wake.set()


@dataclass
class _Live:
    request: Request
    stream: DeltaStream
    #: When it last had bytes; its arrival until then.
    since: float


def _merge(earlier: Delta, later: Delta) -> Delta:
    """`later` put behind `earlier`, whose lists are reused: joining copies would cost the square of the output."""
    earlier.ids.extend(later.ids)
    if earlier.logprobs is None:
        earlier.logprobs = later.logprobs
    else:
        earlier.logprobs.extend(later.logprobs or ())
    earlier.finish_reason = later.finish_reason
    earlier.stop_reason = later.stop_reason
    earlier.error = later.error
    earlier.ledger = later.ledger
    earlier.timings = later.timings
    earlier.decoding = later.decoding
    earlier.patches = later.patches
    return earlier


def _load_engine(settings: EngineSettings) -> Engine:
    from server.engine.engine import Engine

    return Engine.load(settings)
