"""Turns ids into what clients read: whole characters, OpenAI's logprobs, server-sent events."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastblt.models.vocabulary import BYTE_OFFSET, VOCAB_SIZE, decode
from fastblt.server.api.bodies import Bodies, is_short
from fastblt.server.api.http import CONNECTION, HttpProtocol
from fastblt.server.api.names import TOKEN_NAMES
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import ByteLogprobs, Delta

#: Stands for -inf, which JSON cannot represent.
MIN_LOGPROB = -9999.0

#: The byte of every id. It is empty for specials.
_BYTES = [decode([token]) for token in range(VOCAB_SIZE)]

DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class TextDecoder:
    """Decodes bytes into whole characters. An incomplete tail of at most 3 bytes is held back.

    A byte that can never become part of a character gives U+FFFD at once. All pieces joined equal
    `data.decode("utf-8", "replace")`. `completed` counts the characters returned so far.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.completed = 0

    @property
    def pending(self) -> bool:
        """Whether the last byte's character is not complete yet."""
        return bool(self._decoder.getstate()[0])

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The characters that `data` completes. With `final`, an incomplete tail becomes U+FFFD."""
        if data.isascii() and not self.pending:
            self.completed += len(data)
            return data.decode("ascii")
        text = self._decoder.decode(data, final)
        held = self._decoder.getstate()[0]
        if held[:1] == b"\xed" and held[1:2] >= b"\xa0":
            # Half of a surrogate: the library waits for a third byte, although no byte completes a character.
            text += self._decoder.decode(b"", True)
        self.completed += len(text)
        return text


class LogprobsBuilder:
    """Collects OpenAI's legacy `logprobs` object, `{text_offset, token_logprobs, tokens, top_logprobs}`.

    A byte's offset is the number of characters before the one it belongs to, so all bytes of a character share it.
    `names` are the names of all ids, in order.
    """

    def __init__(self, top: int, names: Sequence[str]) -> None:
        self._top = top
        self._names = names
        self._clear()

    def add(self, token: int, value: ByteLogprobs | None, offset: int) -> None:
        """Add one id. `value` is None for the first id of a prompt, for which the model predicts nothing."""
        names = self._names
        name = names[token]
        logprob = top = None
        if value is not None:
            logprob = max(value.logprob, MIN_LOGPROB)
            top = {names[other]: max(other_logprob, MIN_LOGPROB) for other, other_logprob in value.top[: self._top]}
            # The byte itself is always included, with exactly the same number: clients test whether it was the greedy
            # choice by comparing for equality.
            top[name] = logprob
        self._fields["text_offset"].append(offset)
        self._fields["token_logprobs"].append(logprob)
        self._fields["tokens"].append(name)
        self._fields["top_logprobs"].append(top)

    def take(self) -> dict[str, list[Any]]:
        """The entries added since the last call."""
        fields = self._fields
        self._clear()
        return fields

    def _clear(self) -> None:
        self._fields: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }


class ChoiceText:
    """The growing text of one choice and, unless `logprobs` is None, its logprobs with so many alternatives.

    An echoed prompt is fed first, so that a character may begin in the prompt and end in the completion.
    """

    def __init__(self, *, logprobs: int | None, names: Sequence[str] = TOKEN_NAMES) -> None:
        self._decoder = TextDecoder()
        self._logprobs = LogprobsBuilder(logprobs, names) if logprobs is not None else None

    def feed(
        self,
        ids: list[int],
        logprobs: Sequence[ByteLogprobs | None] | None,
        *,
        final: bool,
        ending: tuple[int, ByteLogprobs] | None = None,
    ) -> str:
        """The text that `ids` complete. With `final`, also all that was held back.

        `ending` is an id that ended the completion without being part of it. It appears in the logprobs only.
        """
        decoder, builder = self._decoder, self._logprobs
        if builder is None or not logprobs:
            text = decoder.feed(b"".join([_BYTES[token] for token in ids]), final=final)
        else:
            text = ""
            for token, value in zip(ids, logprobs, strict=True):
                text += decoder.feed(_BYTES[token])
                starts_next = decoder.pending or token < BYTE_OFFSET
                builder.add(token, value, decoder.completed - (0 if starts_next else 1))
            text += decoder.feed(b"", final=final)
        if builder is not None and ending is not None:
            builder.add(*ending, decoder.completed)
        return text

    def take_logprobs(self) -> dict[str, list[Any]] | None:
        """The logprobs of the bytes fed since the last call; None if none were asked for."""
        return self._logprobs.take() if self._logprobs is not None else None


def to_json(data: Any) -> bytes:
    """JSON as one line of UTF-8."""
    return msgspec.json.encode(data)


def one_line(encoded: bytes) -> bytes:
    """JSON with U+0085, U+2028 and U+2029 escaped: httpx, requests and others take them for line ends."""
    if encoded.isascii():
        return encoded
    for character in ("\u0085", "\u2028", "\u2029"):
        encoded = encoded.replace(character.encode(), b"\\u%04x" % ord(character))
    return encoded


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + one_line(to_json(data)) + b"\n\n"


class Events(Protocol):
    """Turns the deltas of a stream into bytes to send. `failed`: an error has ended the stream early."""

    failed: bool

    def render(self, deltas: list[Delta]) -> bytes:
        """The events for one item of the stream."""
        ...

    def size(self, deltas: list[Delta]) -> int:
        """About how many bytes `render` would return."""
        ...

    def last(self) -> bytes:
        """The events after all items."""
        ...


class EventStream(Response):
    """Sends a stream's events as they arrive, then closes the stream. It is closed at once if the client leaves."""

    def __init__(
        self, stream: DeltaStream, events: Events, bodies: Bodies, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        # The base class has set the length of an empty body.
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._stream = stream
        self._events = events
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send, scope.get("extensions", {}).get(CONNECTION)))
        except ClientDisconnect:
            pass  # There is no client to answer.
        finally:
            self._stream.close()

    async def _send(self, send: Send, connection: HttpProtocol | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if connection is not None:
            await self._write(connection)
        else:
            async for deltas in self._stream:
                await send({"type": "http.response.body", "body": await self._render(deltas), "more_body": True})
                if self._events.failed:
                    break
        await send({"type": "http.response.body", "body": self._events.last(), "more_body": False})

    async def _render(self, deltas: list[Delta]) -> bytes:
        return await self._bodies.work(self._events.size(deltas), lambda: self._events.render(deltas))

    async def _write(self, connection: HttpProtocol) -> None:
        """Write to the connection until the stream ends, in the callback for new deltas (`DeltaStream.listen`)."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A large rendering that runs in a thread. Later deltas wait for it.
        busy: asyncio.Task[bytes] | None = None

        def pass_on() -> None:
            nonlocal busy
            if over.done() or (busy is not None and not busy.done()):
                return
            try:
                if busy is not None:
                    connection.write_body(busy.result())
                    busy = None
                if connection.writable and (deltas := self._stream.take()):
                    if not is_short(self._events.size(deltas)):
                        busy = asyncio.ensure_future(self._render(deltas))
                        busy.add_done_callback(lambda _: pass_on())
                        return
                    connection.write_body(self._events.render(deltas))
                if self._stream.ended or self._events.failed:
                    over.set_result(None)
            except Exception as error:
                over.set_exception(error)

        self._stream.listen(pass_on)
        connection.on_writable = pass_on
        try:
            pass_on()
            await over
        finally:
            # Later calls of `pass_on` then return at once.
            over.cancel()
            if busy is not None:
                busy.cancel()
            connection.on_writable = None


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, cancels `work` and raises ClientDisconnect."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(listen())
    try:
        await asyncio.wait((worker, listener), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        listener.cancel()
        await asyncio.gather(worker, listener, return_exceptions=True)
