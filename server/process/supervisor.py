"""Supervises the engine process: starts it, watches it, and decides what follows when it is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from fastblt.models.vocabulary import BOS_ID
from fastblt.server.engine.stats import EngineStats
from fastblt.server.process.engine_process import EngineProcess
from fastblt.server.process.messages import (
    Add,
    AddReply,
    Command,
    Failed,
    Loaded,
    Ping,
    Pong,
    Report,
    Start,
    StepOutput,
    Stop,
)
from fastblt.server.process.watchdog import Condition, Watchdog
from fastblt.server.request import DecodingMethod, DecodingParams, Delta, FinishReason, Request, SamplingParams
from fastblt.server.settings import FailurePolicy, ServiceSettings

logger = logging.getLogger("fastblt.engine")

#: Seconds that an engine which was told to stop has for it.
STOP_SECONDS = 5.0

#: An engine that was lost is replaced at most this often within so many seconds, after a pause.
MAX_RESTARTS = 3
RESTARTS_SECONDS = 600.0
RESTART_PAUSE_SECONDS = 1.0

_PROBE = "probe"
_PROBE_PARAMS = SamplingParams(
    max_tokens=1, temperature=0.0, ignore_eos=True, decoding=DecodingParams(DecodingMethod.BLT)
)


class EngineState(StrEnum):
    """Where an engine stands; requests are taken in READY only. STALLED may pass."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineUnavailableError(RuntimeError):
    """The engine takes no request: it loads, hangs, drains or is dead. `state` says which, the message why."""

    def __init__(self, state: EngineState, message: str) -> None:
        super().__init__(message)
        self.state = state


class Supervisor:
    """One engine process at a time. Confined to an event loop.

    `on_report` gets step outputs and replies, `on_loss` the reason when the engine is lost; `busy` says whether it has
    requests.
    """

    def __init__(
        self,
        start: Start,
        service: ServiceSettings,
        command: Sequence[str],
        *,
        busy: Callable[[], bool],
        on_report: Callable[[StepOutput | AddReply], None],
        on_loss: Callable[[str], None],
    ) -> None:
        self.state = EngineState.LOADING
        self.reason = "the model is loading"
        #: What the engine reported when it was first ready, and its latest counters.
        self.facts: Loaded | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self._start = start
        self._service = service
        self._command = command
        self._busy = busy
        self._on_report = on_report
        self._on_loss = on_loss
        self._process: EngineProcess | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._losses: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._lost = False
        self._pinged = self._probing = self._progressed = False
        #: Whether the last probe failed, and nothing has succeeded since.
        self._sick = False
        self._quiet_since = time.monotonic()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start a process, which begins to load, and the watch over it; returns at once."""
        await self._launch()
        self._spawn(self._watch())

    def send(self, command: Command) -> None:
        """Never waits. What is sent to an engine that is lost is lost with it."""
        if self._process is not None:
            self._process.send(command)

    def drain(self) -> None:
        """Take no more requests. An engine that is of no use now is killed."""
        useful = self.state is EngineState.READY
        self.become(EngineState.DRAINING, "the server is shutting down")
        if not useful and self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End the process, and this. May be called again."""
        if self._process is not None:
            self._process.send(Stop())
            await self._process.ended(STOP_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.state is not EngineState.DEAD:
            self.become(EngineState.STOPPED, "the server has shut down")

    def become(self, state: EngineState, reason: str) -> None:
        self.state = state
        self.reason = reason
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()

    async def wait_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # --- the process ------------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        self._lost = self._pinged = self._probing = self._sick = False
        self._process = EngineProcess(self._hear, self._ended)
        try:
            await self._process.start(self._command)
        except OSError as error:
            self._process = None
            self._ended(f"the engine process cannot be started: {error}")
            return
        self._process.send(self._start)

    async def _relaunch(self) -> None:
        # Longer from loss to loss: what takes the memory of the first may take that of the next.
        await asyncio.sleep(RESTART_PAUSE_SECONDS * 4 ** max(len(self._losses) - 1, 0))
        self.restarts += 1
        await self._launch()

    def _hear(self, report: Report) -> None:
        if self._lost:
            return
        match report:
            case StepOutput():
                self._progressed |= bool(report.deltas or report.started)
                self._take_stats(report.stats)
                for delta in report.deltas if self._probing or self._sick else ():
                    self._examine(delta)
                self._on_report(report)
            case AddReply():
                self._progressed = True
                self._on_report(report)
            case Pong():
                # An engine with work has to get on with it; one without has only to answer.
                self._progressed |= not self._busy() and not self._probing
                self._pinged = False
                self._take_stats(report.stats)
            case Loaded():
                self.facts = report
                self.stats = report.stats
                if self.state is EngineState.LOADING:
                    self.become(EngineState.READY, "")
            case Failed():
                self._lose(report.reason)

    def _take_stats(self, stats: EngineStats | None) -> None:
        if stats is not None:
            self._progressed |= stats.passes != self.stats.passes
            self.stats = stats

    def _ended(self, how: str) -> None:
        """The process has ended, wanted or not; what it said before that has been heard."""
        self._lose(how)
        if self.state is EngineState.LOADING:
            self._spawn(self._relaunch())

    def _lose(self, reason: str) -> None:
        """Give up this process, and decide whether another follows."""
        if self._lost:
            return
        self._lost = True
        nothing = dict.fromkeys(self.stats.pages_cached, 0)
        self.stats = replace(self.stats, running=0, waiting=0, pages_free=self.stats.pages_total, pages_cached=nothing)
        if self.state in (EngineState.READY, EngineState.STALLED, EngineState.LOADING):
            if self.facts is not None:
                logger.error("the engine is lost: %s", reason)
            if self._may_restart():
                self._losses.append(time.monotonic())
                self.become(EngineState.LOADING, f"the engine starts again, since the last one was lost: {reason}")
            else:
                self.become(EngineState.DEAD, reason)
        self._on_loss(reason)

    def _may_restart(self) -> bool:
        """Whether the policy asks for it, an engine has been good here, and it does not happen all the time."""
        if self._service.on_engine_failure is not FailurePolicy.RESTART or self.facts is None:
            return False
        full = len(self._losses) == MAX_RESTARTS
        return not full or time.monotonic() - self._losses[0] > RESTARTS_SECONDS

    # --- the watch --------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        watchdog = Watchdog(self._service.stall_timeout)
        while True:
            await asyncio.sleep(watchdog.interval)
            if self._process is not None:
                self._process.check()
            watched = self.state in (EngineState.READY, EngineState.STALLED, EngineState.DRAINING)
            condition = watchdog.look(self._progressed or not watched)
            self._progressed = False
            if not watched:
                continue
            if condition is Condition.HOPELESS:
                reason = f"the engine made no progress for {watchdog.waited:g} s and was killed"
                assert self._process is not None
                self._process.kill()
                self._lose(reason)
            elif condition is Condition.STALLED and self.state is EngineState.READY:
                logger.error("the engine makes no progress")
                self.become(EngineState.STALLED, f"the engine has made no progress for {watchdog.waited:g} s")
            elif condition is Condition.FINE and self.state is EngineState.STALLED and not self._sick:
                logger.warning("the engine makes progress again")
                self.become(EngineState.READY, "")
            self._ask()

    def _ask(self) -> None:
        """Ask for a sign of life; from an engine that was idle for long, for a forward pass."""
        if not self._pinged:
            self._pinged = True
            self.send(Ping())
        if self._busy():
            self._quiet_since = time.monotonic()
        elif not self._probing and time.monotonic() - self._quiet_since >= self._service.probe_interval:
            self._probing = True
            self.send(Add(-1, [Request(_PROBE, [BOS_ID], _PROBE_PARAMS, time.monotonic())]))

    def _examine(self, delta: Delta) -> None:
        """Learn from the end of a request, the probe's or another."""
        if delta.finish_reason is FinishReason.LENGTH or delta.finish_reason is FinishReason.STOP:
            self._sick = False
        if delta.request_id != _PROBE or delta.finish_reason is None:
            return
        self._probing = False
        self._quiet_since = time.monotonic()
        if delta.finish_reason is FinishReason.ERROR:
            self._sick = True
            if self.state is EngineState.READY:
                logger.error("the engine cannot complete a pass: %s", delta.error)
                self.become(EngineState.STALLED, "the engine cannot complete a pass")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
