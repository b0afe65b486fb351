"""The HTTP front of the replicas: an ASGI application that loads no model.

A request goes to the replica whose cache may hold its prompt. If that replica is lost before it has begun to answer,
the request goes to another one. If it is lost later, the client gets an error that it may retry.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import ray.exceptions
import ray.serve.exceptions
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import ClientDisconnect

from fastblt.deploy.ray.calls import Call, Head, affinity
from fastblt.deploy.ray.metrics import merge
from fastblt.server.api.body import MAX_PROMPT_IDS, max_body_bytes
from fastblt.server.api.errors import RETRY_AFTER_SECONDS, error_object
from fastblt.server.api.streaming import DONE, until_disconnect

logger = logging.getLogger("fastblt.front")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: How often a request is sent, if each replica is lost before it begins to answer.
ATTEMPTS = 3

#: The largest body of any call, for any model.
_MAX_BODY_BYTES = max_body_bytes(MAX_PROMPT_IDS)

#: Seconds that the replicas have to return their metrics.
METRICS_SECONDS = 5.0

_LOST = (ray.exceptions.RayError, ray.serve.exceptions.RayServeException)
_JSON = [(b"content-type", b"application/json")]


class Front:
    """The ASGI application. `replicas` is the handle of the `Replica` deployment."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return
        call = await _read(scope, receive)
        if call is None:
            return  # The client left before the whole request had arrived.
        if call.path == "/metrics":
            return await self._metrics(send)
        # When the client leaves, the answer is canceled, and so is the request at the replica.
        with suppress(ClientDisconnect):
            await until_disconnect(receive, self._forward(call, send))

    async def _forward(self, call: Call, send: Send) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            answer = _Answer(send)
            pieces: DeploymentResponseGenerator[Head | bytes] | None = None
            try:
                pieces = self._replicas.options(stream=True, session_id=affinity(call)).answer.remote(call)
                async for piece in pieces:
                    await answer.piece(piece)
                return await answer.end()
            except ray.serve.exceptions.BackPressureError:
                return await _refuse(send, 429, "queue_full", "all replicas are busy, and the queue is full")
            except _LOST as error:
                logger.warning("a replica was lost with a request (attempt %d): %s", attempt, type(error).__name__)
                if answer.began:
                    return await answer.broken()
            finally:
                if pieces is not None:
                    pieces.cancel()
        await _refuse(send, 503, "replica_lost", "the replicas that had this request were lost; send it again")

    async def _metrics(self, send: Send) -> None:
        """Send the metrics of all replicas, with the label `replica`."""
        found = await self._replicas.broadcast("metrics").results_async(
            timeout_s=METRICS_SECONDS, return_exceptions=True
        )
        text = merge(dict(one for one in found if isinstance(one, tuple)))
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": text})


class _Answer:
    """Passes an answer on to the client, and knows how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.began = False
        self._events = False

    async def piece(self, piece: Head | bytes) -> None:
        if isinstance(piece, Head):
            self.began = True
            self._events = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in piece.headers)
            await self._send({"type": "http.response.start", "status": piece.status, "headers": piece.headers})
        else:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def broken(self) -> None:
        """The replica was lost during the answer. A stream gets an error event; otherwise the connection is closed.

        Raises ConnectionError to close it.
        """
        if not self._events:
            raise ConnectionError("a replica was lost within its answer")
        lost = error_object(503, "the replica that had this request was lost; send it again", "replica_lost")
        await self._send({"type": "http.response.body", "body": b"data: " + json.dumps(lost).encode() + b"\n\n" + DONE})


async def _read(scope: Message, receive: Receive) -> Call | None:
    """The whole request; None if the client left. Of a body that is too large, a little more than the limit is read,
    so that the replica refuses it."""
    body = bytearray()
    more = True
    while more and len(body) <= _MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    # The client's content length is replaced, since the body may not have been read to its end.
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return Call(
        scope["method"],
        scope["path"],
        scope["query_string"],
        [*headers, (b"content-length", b"%d" % len(body))],
        bytes(body),
    )


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    headers = [*_JSON, (b"retry-after", b"%d" % RETRY_AFTER_SECONDS)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_object(status, message, code)).encode()})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
