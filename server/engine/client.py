"""Speaks to the engine process from an event loop, and keeps the requests that are alive in it.

All state belongs to the loop. Nothing here waits for a pass, and nothing is done for single bytes: what a pass gave
comes in one frame, and each request's part of it goes to the stream of whoever asked for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from models.config import BltConfig
from server.engine.channel import Abort, Add, Failed, Loaded, News, Pong, Problem, Report, Start, Stop, Verdict
from server.engine.link import ENGINE_COMMAND, EngineLink
from server.engine.stats import EngineStats
from server.engine.stream import DeltaStream
from server.logs import LogSettings
from server.request import Delta, FinishReason, InvalidRequestError, QueueFullError, Request
from server.settings import EngineSettings

logger = logging.getLogger("fastblt.engine")

#: Seconds that a stopping engine has for the last news, and again to exit.
LAST_WORDS_SECONDS = 5.0


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
    """One engine process, and the requests alive in it.

    `name` is the model's id for users, the engine's own by default. `command` starts the process.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        name: str | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
        log: LogSettings | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.observer = observer
        self.state = EngineState.LOADING
        self.reason = "the model is loading"
        self._name = name
        self._command = command
        self._log = log or LogSettings()
        self._link: EngineLink | None = None
        self._facts: Loaded | None = None
        self._stats = EngineStats()
        self._live: dict[str, _Live] = {}
        self._verdicts: dict[int, _Verdict] = {}
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Lock()

    @property
    def loaded(self) -> bool:
        """Whether the engine was ever ready."""
        return self._facts is not None

    @property
    def pid(self) -> int | None:
        """The engine process's id."""
        return self._link.pid if self._link is not None else None

    @property
    def model_name(self) -> str:
        """Raises EngineUnavailableError, as the other facts do, unless the engine is usable."""
        return self._name or self._usable().model_name

    @property
    def config(self) -> BltConfig:
        return self._usable().config

    @property
    def max_model_len(self) -> int:
        """Bytes of prompt (BOS included) and completion together that one request may have."""
        return self._usable().max_model_len

    def stats(self) -> EngineStats:
        """The engine's counters as it last told them. Raises EngineUnavailableError before it is loaded."""
        if self._facts is None:
            raise EngineUnavailableError(self.state, self.reason)
        return self._stats

    async def start(self) -> None:
        """Start the process, which begins to load; returns at once."""
        self._link = EngineLink(self._hear, self._end)
        try:
            await self._link.start(self._command)
        except OSError as error:
            self._link = None
            self._die(f"the engine process cannot be started: {error}")
            return
        self._link.send(Start(self.settings, self._log))

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
        if self.state is not EngineState.READY or self._link is None:
            raise EngineUnavailableError(self.state, self.reason)
        bound = self.settings.max_waiting
        if len(requests) > bound:
            raise InvalidRequestError(f"{len(requests)} completions were asked for; the queue holds {bound}", "n")
        undecided = sum(len(verdict.requests) for verdict in self._verdicts.values())
        if undecided + len(requests) > bound:
            raise QueueFullError(f"the waiting queue holds {bound} requests")
        stream = DeltaStream(self.abort, requests)
        for request in requests:
            self._live[request.request_id] = _Live(request, stream, request.arrival)
        number = next(self._numbers)
        verdict = _Verdict(requests, asyncio.get_running_loop().create_future())
        self._verdicts[number] = verdict
        self._link.send(Add(number, list(requests)))
        try:
            await verdict.future
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Ask the engine to end a request; its stream ends with FinishReason.ABORT. Unknown ids are ignored."""
        if self._link is not None and request_id in self._live:
            self._link.send(Abort([request_id]))

    async def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests, give those that run `timeout` seconds, abort what is left, and end the process.

        A second call, while the first still waits, ends the waiting.
        """
        if self.state is EngineState.READY:
            self._become(EngineState.DRAINING, "the server is shutting down")
            await self._drain(timeout)
        elif self.state is EngineState.LOADING:
            self._become(EngineState.DRAINING, "the server is shutting down")
            if self._link is not None:
                self._link.kill()
        async with self._stopping:
            await self._finish()

    async def _finish(self) -> None:
        if self._link is not None:
            if self._live:
                self._link.send(Abort(list(self._live)))
                await self._drain(LAST_WORDS_SECONDS)
            self._link.send(Stop())
            await self._link.ended(LAST_WORDS_SECONDS)
        if self.state is not EngineState.DEAD:
            self._become(EngineState.STOPPED, "the server has shut down")
        self._fail_all(FinishReason.ABORT, "the server has shut down")

    # --- what the engine says ---------------------------------------------------------------------------------------

    def _hear(self, report: Report) -> None:
        match report:
            case News():
                if report.stats is not None:
                    self._stats = report.stats
                self._deliver(report.deltas)
            case Verdict():
                self._decide(report.number, _refusal(report.problem))
            case Pong():
                self._stats = report.stats
            case Loaded():
                self._facts = report
                if self.state is EngineState.LOADING:
                    self._become(EngineState.READY, "")
            case Failed():
                self._die(report.reason)

    def _end(self, how: str) -> None:
        """The process has ended, wanted or not."""
        if self.state is EngineState.DRAINING:
            self._fail_all(FinishReason.ERROR, how)
        elif self.state not in (EngineState.STOPPED, EngineState.DEAD):
            logger.error("%s", how)
            self._die(how)

    def _decide(self, number: int, problem: Exception | None) -> None:
        verdict = self._verdicts.pop(number, None)
        if verdict is None:
            return
        if problem is not None:
            for request in verdict.requests:
                self._live.pop(request.request_id, None)
            self._changed.set()
        if verdict.future.done():
            return
        if problem is None:
            verdict.future.set_result(None)
        else:
            verdict.future.set_exception(problem)

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
        for number in list(self._verdicts):
            self._decide(number, EngineUnavailableError(self.state, reason))
        self._deliver([Delta(request_id, finish_reason=finish, error=reason) for request_id in self._live])

    def _usable(self) -> Loaded:
        if self._facts is None or self.state not in (EngineState.READY, EngineState.DRAINING):
            raise EngineUnavailableError(self.state, self.reason)
        return self._facts

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
            logger.warning("%d requests did not finish in time", len(self._live))


@dataclass
class _Live:
    request: Request
    stream: DeltaStream
    #: When it last had bytes; its arrival until then.
    since: float


@dataclass
class _Verdict:
    """A submission that the engine has not answered yet."""

    requests: Sequence[Request]
    future: asyncio.Future[None]


def _refusal(problem: Problem | None) -> Exception | None:
    if problem is None:
        return None
    match problem.kind:
        case "invalid":
            return InvalidRequestError(problem.message, problem.param)
        case "full":
            return QueueFullError(problem.message)
        case _:
            return RuntimeError(problem.message)
