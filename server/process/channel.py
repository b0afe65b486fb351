"""The engine's end of the socket to its server."""

from __future__ import annotations

import socket

from fastblt.server.framing import Unpacker, pack
from fastblt.server.process.messages import Command, Report

#: Bytes to read at once.
_CHUNK = 1 << 20


class ChannelClosed(ConnectionError):
    """The server is gone."""


class EngineChannel:
    """The engine's end: it reads between passes and blocks only where it has nothing to do."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unpacker: Unpacker[Command] = Unpacker(Command)

    def read(self, *, block: bool) -> list[Command]:
        """What has arrived; with `block`, at least one message. Raises ChannelClosed."""
        commands: list[Command] = []
        while True:
            try:
                data = self._sock.recv(_CHUNK, 0 if block and not commands else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return commands
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            commands += self._unpacker.feed(data)

    def send(self, *reports: Report) -> None:
        """Raises ChannelClosed."""
        try:
            self._sock.sendall(pack(reports))
        except OSError as error:
            raise ChannelClosed from error
