"""One engine process as the server sees it: starts it, sends commands, receives reports, learns of its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from fastblt.server.child_process import child_environment
from fastblt.server.framing import Unpacker, pack
from fastblt.server.process.messages import Command, Report

logger = logging.getLogger("fastblt.engine")

#: How the engine process is started.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "fastblt.server.process.engine_main")

#: Seconds that a process has to exit once its channel is closed.
_EXIT_SECONDS = 5.0

#: Seconds between two looks at whether it has.
_POLL_SECONDS = 0.01


class EngineProcess(asyncio.Protocol):
    """An engine process and the socket to it. To be used within an event loop.

    `on_report` gets every message of the process, then `on_end` is called once, with how the process ended.
    """

    def __init__(self, on_report: Callable[[Report], None], on_end: Callable[[str], None]) -> None:
        self._on_report = on_report
        self._on_end = on_end
        self._unpacker: Unpacker[Report] = Unpacker(Report)
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self, command: Sequence[str]) -> None:
        """Start the process. Raises OSError if it cannot be."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=child_environment())
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)

    def send(self, command: Command) -> None:
        """Never waits. What is sent to a process that has ended is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack([command]))

    def kill(self) -> None:
        """End the process now, stopped or not."""
        if self._process is not None:
            self._process.kill()
        if self._transport is not None:
            # A child of the process may hold the channel open.
            self._transport.abort()

    def check(self) -> None:
        """Called from time to time: notices an end of the process that its socket does not tell."""
        if self._process is not None and self._process.poll() is not None:
            self.kill()

    async def ended(self, timeout: float) -> None:
        """Wait for the process to end; kill it after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            logger.warning("the engine process does not end; it is killed")
            self.kill()
            await self._ended.wait()

    # --- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's own transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for report in self._unpacker.feed(data):
                self._on_report(report)
        except msgspec.DecodeError:
            logger.exception("the engine process sent what is no message; it is killed")
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        how = "the engine process is lost"
        try:
            how = _how(await self._status())
        except Exception:
            logger.exception("the end of the engine process cannot be told; it is killed")
            self.kill()
        finally:
            # Whatever went wrong: nobody waits for this process for ever.
            self._ended.set()
            self._on_end(how)

    async def _status(self) -> int:
        """The exit status. Asked for again and again: waiting in a thread needs a thread, which can be refused."""
        assert self._process is not None
        for _ in range(int(_EXIT_SECONDS / _POLL_SECONDS)):
            if (status := self._process.poll()) is not None:
                return status
            await asyncio.sleep(_POLL_SECONDS)
        self.kill()
        while (status := self._process.poll()) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return status


def _how(status: int) -> str:
    if status >= 0:
        return f"the engine process exited with status {status}"
    try:
        return f"the engine process was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"the engine process was killed by signal {-status}"
