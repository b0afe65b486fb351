"""The HTTP application around one engine."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import completions, errors, operations
from server.api.metrics import Metrics
from server.engine.client import EngineClient, EngineUnavailableError
from server.engine.stats import EngineStats

_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


def create_app(client: EngineClient) -> FastAPI:
    """An app that starts `client`'s engine with itself and stops it at its end.

    It answers while the engine still loads. `client.observer` is set to the app's metrics.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await client.start()
        try:
            yield
        finally:
            # The server has let its connections finish before it ends the lifespan.
            await client.stop()

    def stats() -> EngineStats | None:
        try:
            return client.stats()
        except EngineUnavailableError:
            return None

    # The interactive pages would fetch scripts from elsewhere.
    app = FastAPI(title="FastBLT", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.client = client
    app.state.metrics = Metrics(stats)
    client.observer = app.state.metrics.observe
    errors.install(app)
    app.include_router(completions.router)
    app.include_router(operations.router)
    app.add_middleware(RequestIds)
    return app


class RequestIds:
    """Gives every response an `x-request-id`: the client's own if it is sane, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
