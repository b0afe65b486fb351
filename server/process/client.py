"""The engine client: the HTTP server's side of the engine, within its event loop.

All state belongs to the loop. Nothing here waits for a pass or is done byte by byte: what a step gave comes in one
frame, and each request's part of it goes to the stream of its HTTP handler.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol
from weakref import WeakSet

from fastblt.models.config import BltConfig
from fastblt.server.engine.stats import EngineAbout, EngineStats
from fastblt.server.logs import LogSettings
from fastblt.server.process.engine_process import ENGINE_COMMAND
from fastblt.server.process.grammar_probe import GrammarProbe
from fastblt.server.process.messages import Abort, Add, AddReply, Loaded, Problem, Start, StepOutput
from fastblt.server.process.stream import DeltaStream
from fastblt.server.process.supervisor import EngineState, EngineUnavailableError, Supervisor
from fastblt.server.request import Delta, ErrorCode, FinishReason, InvalidRequestError, QueueFullError, Request
from fastblt.server.settings import EngineSettings, ServiceSettings

logger = logging.getLogger("fastblt.engine")

#: Memory for the log-probabilities of all requests until somebody reads them.
MAX_LOGPROB_BYTES = 256 * 2**20

#: Seconds that a stopping engine has to end the requests that were aborted.
LAST_WORDS_SECONDS = 5.0


@dataclass
class LiveRequest:
    """What the server knows of a request that the engine has. Times are monotonic seconds.

    `latest` is when it last got bytes (at first, when it arrived), `started` when it left the queue, `first` when its
    first byte came; `bytes` counts its output.
    """

    request: Request
    stream: DeltaStream
    latest: float
    started: float | None = None
    first: float | None = None
    bytes: int = 0
    #: Deadlines that have not passed yet.
    queue_timer: asyncio.TimerHandle | None = None
    timer: asyncio.TimerHandle | None = None
    #: The context variables of its HTTP handler.
    context: Context = field(default_factory=copy_context)
    #: Why it was aborted, as metrics count it.
    abort_cause: str | None = None

    def cancel(self) -> None:
        for timer in (self.queue_timer, self.timer):
            if timer is not None:
                timer.cancel()


class Observer(Protocol):
    """Called with every delta, before `live` counts it; also when the reader has left."""

    def __call__(self, live: LiveRequest, delta: Delta, now: float) -> None: ...


class EngineClient:
    """One engine, and the requests alive in it.

    `name` is the model's id for users, the engine's own by default, and `aliases` are other names that they may ask
    for. `command` starts the process.
    """

    def __init__(
        self,
        settings: EngineSettings,
        service: ServiceSettings | None = None,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        command: Sequence[str] = ENGINE_COMMAND,
        log: LogSettings | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.settings = settings
        self.service = service or ServiceSettings()
        self.observers = observers
        self._name = name
        self._aliases = tuple(aliases)
        self._live: dict[str, LiveRequest] = {}
        #: How many of them have not left the queue.
        self._queued = 0
        self._pending_adds: dict[int, _PendingAdd] = {}
        self._streams: WeakSet[DeltaStream] = WeakSet()
        self._numbers = itertools.count()
        self._stopping = asyncio.Lock()
        self._grammars = GrammarProbe()
        self._supervisor = Supervisor(
            Start(settings, log or LogSettings()),
            self.service,
            command,
            busy=lambda: bool(self._live),
            on_report=self._hear,
            on_loss=lambda reason: self._end_all(FinishReason.ERROR, reason),
        )

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def reason(self) -> str:
        """Why no request is taken in this state."""
        return self._supervisor.reason

    @property
    def loaded(self) -> bool:
        """Whether the engine was ever ready."""
        return self._supervisor.facts is not None

    @property
    def load(self) -> int:
        """How many requests the engine has, queued or running."""
        return len(self._live)

    @property
    def restarts(self) -> int:
        """How often a lost engine was replaced."""
        return self._supervisor.restarts

    @property
    def pid(self) -> int | None:
        """The engine process's id."""
        return self._supervisor.pid

    @property
    def model_name(self) -> str:
        """Raises EngineUnavailableError, as the other facts do, unless the engine is usable."""
        return self._name or self._facts().model_name

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that requests may ask for, the model's id first."""
        return (self.model_name, *self._aliases)

    @property
    def served_name(self) -> str:
        """The model's name, whatever the engine's state is; empty before it is known."""
        facts = self._supervisor.facts
        return self._name or (facts.model_name if facts is not None else "")

    @property
    def about(self) -> EngineAbout | None:
        """What the engine told of itself when it was loaded."""
        return self._facts().about

    @property
    def config(self) -> BltConfig:
        return self._facts().config

    @property
    def max_model_len(self) -> int:
        """Bytes of prompt (BOS included) and completion together that one request may have."""
        return self._facts().max_model_len

    def stats(self) -> EngineStats:
        """The engine's counters as it last told them. Raises EngineUnavailableError before it is loaded."""
        if not self.loaded:
            raise self._unavailable()
        return self._supervisor.stats

    async def start(self) -> None:
        """Start the process, which begins to load; returns at once."""
        await self._supervisor.start()

    async def ready(self) -> None:
        """Wait until the engine is loaded. Raises EngineUnavailableError if it cannot be, or was stopped."""
        while self.state is EngineState.LOADING:
            await self._supervisor.wait_change()
        if self.state is not EngineState.READY:
            raise self._unavailable()

    async def ended(self) -> None:
        """Wait until the engine is dead for good, or stopped."""
        while self.state not in (EngineState.DEAD, EngineState.STOPPED):
            await self._supervisor.wait_change()

    async def submit(self, *requests: Request, whole: bool = False) -> DeltaStream:
        """Hand requests to the engine, all or none, and return the stream of their deltas, or of `whole` outputs.

        Raises InvalidRequestError or QueueFullError when the engine refuses one of them, EngineUnavailableError when it
        is not ready.
        """
        self._require_ready()
        for structured in {r.params.structured_output for r in requests}:
            if structured is not None:
                await self._grammars.check(structured)
                self._require_ready()
        bound = self.settings.max_waiting
        if len(requests) > bound:
            raise InvalidRequestError(f"{len(requests)} completions were asked for; the queue holds {bound}", "n")
        # The engine decides; under overload nobody need wait for its answer.
        if self._queued + len(requests) > bound:
            raise QueueFullError(f"the waiting queue holds {bound} requests")
        self._check_memory(requests)
        stream = DeltaStream(self.abort, requests, whole=whole)
        self._streams.add(stream)
        number = next(self._numbers)
        pending = _PendingAdd(requests, asyncio.get_running_loop().create_future())
        self._pending_adds[number] = pending
        for request in requests:
            self._live[request.request_id] = self._track(request, stream, number)
        self._queued += len(requests)
        self._supervisor.send(Add(number, list(requests)))
        try:
            await pending.future
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, request_id: str, cause: str = "caller") -> None:
        """Ask the engine to end a request; its stream ends with FinishReason.ABORT. Unknown ids are ignored.

        `cause` is the word under which metrics count it.
        """
        if (live := self._live.get(request_id)) is not None:
            live.abort_cause = live.abort_cause or cause
            self._supervisor.send(Abort([request_id]))

    async def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests, give those that run `timeout` seconds, abort what is left, and end the process.

        A second call, while the first still waits, ends the waiting.
        """
        if self.state in (EngineState.LOADING, EngineState.READY, EngineState.STALLED):
            self._supervisor.drain()
            await self._wait_idle(timeout)
        async with self._stopping:
            if self._live:
                self._supervisor.send(Abort(list(self._live)))
                await self._wait_idle(LAST_WORDS_SECONDS)
            await self._supervisor.stop()
            await self._grammars.close()
            self._end_all(FinishReason.ABORT, "the server has shut down")

    # --- reports of the engine --------------------------------------------------------------------------------------

    def _hear(self, report: StepOutput | AddReply) -> None:
        if isinstance(report, AddReply):
            self._decide(report.number, _refusal(report.problem))
            return
        now = time.monotonic()
        for request_id in report.started:
            live = self._live.get(request_id)
            if live is not None:
                live.started = now
                self._queued -= 1
                if live.queue_timer is not None:
                    live.queue_timer.cancel()
        self._deliver(report.deltas)

    def _decide(self, number: int, problem: Exception | None) -> None:
        pending = self._pending_adds.pop(number, None)
        if pending is None:
            return
        if problem is not None:
            for request in pending.requests:
                self._forget(request.request_id)
        if pending.future.done():
            return
        if problem is None:
            pending.future.set_result(None)
        else:
            pending.future.set_exception(problem)

    def _deliver(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            for observe in self.observers:
                observe(live, delta, now)
            if delta.ids:
                live.latest = now
                live.first = live.first or now
                live.bytes += len(delta.ids)
            if delta.finish_reason is not None:
                self._forget(delta.request_id)
            live.stream.push(delta)

    def _forget(self, request_id: str) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live.cancel()
            self._queued -= live.started is None
        if not self._live:
            self._supervisor.notify()

    def _end_all(self, finish: FinishReason, reason: str) -> None:
        """End every request that still waits for the engine."""
        for number in list(self._pending_adds):
            self._decide(number, EngineUnavailableError(self.state, reason))
        code = ErrorCode.ENGINE_DIED if finish is FinishReason.ERROR else None
        self._deliver([Delta(i, finish_reason=finish, error=reason, error_code=code) for i in self._live])

    def _check_memory(self, requests: Sequence[Request]) -> None:
        """Raises InvalidRequestError or QueueFullError for more log-probabilities than may be kept for readers."""
        asked = sum(request.logprob_bytes for request in requests)
        if not asked:
            return
        if asked > MAX_LOGPROB_BYTES:
            raise InvalidRequestError(
                f"logprobs of up to {asked >> 20} MiB were asked for; this server keeps {MAX_LOGPROB_BYTES >> 20} MiB: "
                "ask for fewer choices, alternatives or max_tokens",
                "logprobs",
            )
        if asked + sum(stream.logprob_bytes for stream in self._streams) > MAX_LOGPROB_BYTES:
            raise QueueFullError("the logprobs of running requests may fill this server's memory for them")

    # --- deadlines --------------------------------------------------------------------------------------------------

    def _track(self, request: Request, stream: DeltaStream, number: int) -> LiveRequest:
        live = LiveRequest(request, stream, request.arrival)
        late = time.monotonic() - request.arrival
        call_later = asyncio.get_running_loop().call_later
        expire = partial(self._expire, request.request_id, number)
        if (limit := self.service.queue_timeout) is not None:
            error = f"the request waited {limit:g} s for its turn; try again later"
            live.queue_timer = call_later(limit - late, expire, ErrorCode.QUEUE_TIMEOUT, error)
        if (limit := self.service.request_timeout) is not None:
            error = f"the request was not finished within {limit:g} s; ask for fewer bytes"
            live.timer = call_later(limit - late, expire, ErrorCode.REQUEST_TIMEOUT, error)
        return live

    def _expire(self, request_id: str, number: int, code: ErrorCode, error: str) -> None:
        """End a request now, whatever the engine does."""
        self.abort(request_id)
        self._deliver([Delta(request_id, finish_reason=FinishReason.ERROR, error=error, error_code=code)])
        # If its caller still waits to be accepted, the stream then tells of the error.
        self._decide(number, None)

    # --- states -----------------------------------------------------------------------------------------------------

    def _facts(self) -> Loaded:
        facts = self._supervisor.facts
        if facts is None or self.state not in (EngineState.READY, EngineState.STALLED, EngineState.DRAINING):
            raise self._unavailable()
        return facts

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise self._unavailable()

    def _unavailable(self) -> EngineUnavailableError:
        return EngineUnavailableError(self.state, self.reason)

    async def _wait_idle(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while self._live:
                    await self._supervisor.wait_change()
        except TimeoutError:
            logger.warning("%d requests did not finish in time", len(self._live))


@dataclass
class _PendingAdd:
    """An Add that the engine has not answered yet."""

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
