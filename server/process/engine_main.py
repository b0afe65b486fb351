"""The engine process: `python -m fastblt.server.process.engine_main`, with the channel to its server as standard input.

It loads the engine, then carries out commands between steps until it is told to stop or its server is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastblt.server import logs
from fastblt.server.engine.stats import EngineAbout
from fastblt.server.logs import progress
from fastblt.server.process.channel import ChannelClosed, EngineChannel
from fastblt.server.process.messages import (
    Abort,
    Add,
    AddReply,
    Command,
    Failed,
    Loaded,
    Ping,
    Pong,
    Problem,
    Start,
    StepOutput,
    Stop,
)
from fastblt.server.request import InvalidRequestError, QueueFullError, Request
from fastblt.server.settings import EngineSettings

if TYPE_CHECKING:
    from fastblt.server.engine.engine import Engine

logger = logging.getLogger("fastblt.engine")

#: Seconds between two snapshots of a busy engine's counters.
STATS_SECONDS = 0.1


def main(load: Callable[[EngineSettings], Engine] | None = None) -> int:
    """Run the process; returns its exit status. `load` makes the engine, by default from a checkpoint."""
    # A terminal and a service manager signal every process; this one ends when its server says so, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = EngineChannel(_take_standard_input())
    try:
        [start] = channel.read(block=True)
        assert isinstance(start, Start)
        logs.configure(start.log)
        return _serve(channel, load or _load_checkpoint, start.settings, None if load else _about)
    except ChannelClosed:
        logger.info("the server is gone")
        return 0


def _serve(
    channel: EngineChannel,
    load: Callable[[EngineSettings], Engine],
    settings: EngineSettings,
    about: Callable[[Engine], EngineAbout] | None,
) -> int:
    try:
        engine = load(settings)
        facts = about(engine) if about is not None else None
        loaded = Loaded(engine.model_name, engine.config, engine.max_model_len, engine.stats(), facts)
    except Exception as error:
        logger.debug("loading failed", exc_info=True)
        channel.send(Failed(_reason(error)))
        return 1
    channel.send(loaded)
    worker = _Worker(channel, engine)
    try:
        worker.run()
    except ChannelClosed:
        raise
    except Exception as error:
        logger.exception("the engine failed")
        channel.send(Failed(f"the engine failed: {type(error).__name__}"))
        return 1
    return 0


def _reason(error: Exception) -> str:
    # Python's own has no words, and torch's for a CPU are those of its source.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; give it more (ulimit -v, the container's limit), or a smaller --cache-size"
    return str(error) or type(error).__name__


class _Worker:
    def __init__(self, channel: EngineChannel, engine: Engine) -> None:
        self._channel = channel
        self._engine = engine
        self._next_stats = 0.0

    def run(self) -> None:
        """Until the server says stop. Raises ChannelClosed when it is gone."""
        engine = self._engine
        while True:
            for command in self._channel.read(block=not engine.has_work()):
                if isinstance(command, Stop):
                    if engine.has_work():
                        # Requests that were just aborted end with a step.
                        self._step()
                    return
                self._obey(command)
            if engine.has_work():
                self._step()

    def _obey(self, command: Command) -> None:
        match command:
            case Add():
                self._channel.send(AddReply(command.number, self._add(command.requests)))
            case Abort():
                for request_id in command.request_ids:
                    self._engine.abort(request_id)
            case Ping():
                self._channel.send(Pong(self._engine.stats()))

    def _step(self) -> None:
        deltas = self._engine.step()
        now = time.monotonic()
        stats = None
        if now >= self._next_stats or not self._engine.has_work():
            stats = self._engine.stats()
            self._next_stats = now + STATS_SECONDS
        if deltas or self._engine.started or stats is not None:
            self._channel.send(StepOutput(deltas, self._engine.started, stats))
        if not self._engine.has_work() and not self._engine.balanced():
            logger.error("the engine is idle, and not all of its memory is free: %s", self._engine.stats())

    def _add(self, requests: list[Request]) -> Problem | None:
        for done, request in enumerate(requests):
            try:
                # Its grammar was tried before; nobody waits for it to be compiled here.
                self._engine.add(request, wait=False)
            except Exception as error:
                for earlier in requests[:done]:
                    self._engine.abort(earlier.request_id)
                return _problem(error)
        return None


def _problem(error: Exception) -> Problem:
    match error:
        case InvalidRequestError():
            return Problem("invalid", str(error), error.param)
        case QueueFullError():
            return Problem("full", str(error))
        case _:
            logger.error("a request could not be added", exc_info=error)
            return Problem("fault", "the engine failed to take the request")


def _take_standard_input() -> socket.socket:
    """The socket that is standard input, moved away so that nothing else reads from it."""
    sock = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return sock


def _load_checkpoint(settings: EngineSettings) -> Engine:
    progress.info("importing torch")
    # Not at the top: torch takes seconds, and a test's engine needs none of it.
    from fastblt.server.engine.engine import Engine

    began = time.monotonic()
    engine = Engine.load(settings)
    progress.info("the model is loaded (%.1f s)", time.monotonic() - began)
    progress.info("measuring what passes cost here")
    engine.calibrate()
    return engine


def _about(engine: Engine) -> EngineAbout:
    from fastblt.server.engine.about import about

    return about(engine)


if __name__ == "__main__":
    sys.exit(main())
