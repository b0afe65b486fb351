"""Middleware around every request: its id, its access log line, its metrics, and HEAD."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastblt.server import logs
from fastblt.server.api import tracing
from fastblt.server.api.metrics import Metrics

logger = logging.getLogger("fastblt.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


class Requests:
    """Gives every response an `x-request-id`: the client's own if it is valid, else a new one.

    Counts requests and logs them.
    HEAD is answered like GET, without the body.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope["request_id"] = request_id
        # The status of the answer if an exception reaches this middleware.
        status = 500
        head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if head else scope

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif head:
                message["body"] = b""
            await send(message)

        token = logs.request_id.set(request_id)
        parent = tracing.parent.set(headers.get("traceparent"))
        start = time.monotonic()
        try:
            await self._app(inner, receive, send_with_id)
        finally:
            seconds = time.monotonic() - start
            # An unknown path is not used as a label: clients could make any number of them.
            route = getattr(inner.get("route"), "path", "other")
            self._metrics.count_http(scope["method"], route, status, seconds)
            if self._access_log:
                self._log(scope, status, seconds)
            logs.request_id.reset(token)
            tracing.parent.reset(parent)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        client = scope.get("client") or ("-",)
        fields = {
            "client": client[0],
            "method": scope["method"],
            # Not decoded: a decoded path may contain line breaks.
            "path": scope.get("raw_path", b"").decode("ascii", "backslashreplace"),
            "status": status,
            "seconds": round(seconds, 6),
        }
        text = "%(client)s %(method)s %(path)s %(status)d %(seconds).3f s"
        logger.info(text, fields, extra={"fields": fields})
