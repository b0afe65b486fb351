"""What the server and its engine process say to each other, as msgpack in frames over a Unix socket.

A frame is the length of its payload (4 bytes, big-endian) and the payload: a list of messages. The engine sends one
frame a pass. Both ends decode into the declared types only, and nothing that arrives can name code.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from fastblt.models.config import BltConfig
from fastblt.server.engine.stats import EngineStats
from fastblt.server.logs import LogSettings
from fastblt.server.request import Delta, Request
from fastblt.server.settings import EngineSettings

_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 20


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages; its tag is the name of its class."""


# From the server.


class Start(Message):
    """The first message: what to load, and how to log."""

    settings: EngineSettings
    log: LogSettings


class Add(Message):
    """Take these requests, all or none; answered by a Verdict with the same number."""

    number: int
    requests: list[Request]


class Abort(Message):
    """End these requests; unknown ids are ignored."""

    request_ids: list[str]


class Ping(Message):
    """Answered by a Pong between passes."""


class Stop(Message):
    """Give last news of what was aborted, and exit."""


Command = Start | Add | Abort | Ping | Stop


# From the engine.


class Loaded(Message):
    """The engine is ready. `max_model_len` counts bytes, BOS included."""

    model_name: str
    config: BltConfig
    max_model_len: int
    stats: EngineStats


class Failed(Message):
    """The engine could not be loaded, or failed; the process exits. `reason` is fit for a client's eyes."""

    reason: str


class Problem(msgspec.Struct):
    """Why a request was refused. `kind` is `invalid` (it can never be served), `full` (the queue is) or `fault`."""

    kind: str
    message: str
    param: str | None = None


class AddReply(Message):
    number: int
    problem: Problem | None = None


class StepOutput(Message):
    """What came of a pass. `started` are the requests that left the queue for it, for the first time. `stats` comes
    from time to time, and when nothing is left to do.
    """

    deltas: list[Delta]
    started: list[str]
    stats: EngineStats | None = None


class Pong(Message):
    stats: EngineStats


Report = Loaded | Failed | AddReply | StepOutput | Pong

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def pack(messages: Sequence[Message]) -> bytes:
    """One frame."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(messages, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return bytes(frame)


class Unpacker(Generic[M]):
    """Splits a stream of bytes into messages. Raises msgspec.DecodeError for what is no frame of `kind`."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(self._buffer, start)[0]
            if len(self._buffer) < end:
                break
            with memoryview(self._buffer) as view, view[start + _LENGTH.size : end] as payload:
                messages = self._decoder.decode(payload)
            start = end
            yield from messages
        del self._buffer[:start]


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
