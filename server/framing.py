"""Messages between our own processes: msgpack in frames over a Unix socket.

A frame is the length of its payload (4 bytes, big-endian) and the payload: a list of messages. Both ends decode into
the declared types only, and nothing that arrives can name code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages; its tag is the name of its class."""


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
