"""One engine and its HTTP API as a Ray Serve replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from fastapi import FastAPI
from ray import serve

from fastblt.deploy.ray.calls import Call, Head
from fastblt.server.api.app import create_app
from fastblt.server.logs import LogSettings, configure
from fastblt.server.process.client import EngineClient, EngineState
from fastblt.server.settings import EngineSettings, HttpSettings, ServiceSettings

logger = logging.getLogger("fastblt")

Message = MutableMapping[str, Any]


class Replica:
    """It counts as started once its engine is loaded. When the engine is dead or stalled, Ray replaces the replica."""

    # Ray awaits the constructor.
    async def __init__(  # type: ignore[misc]
        self, engine: EngineSettings, service: ServiceSettings, http: HttpSettings
    ) -> None:
        configure(LogSettings())
        self._client = EngineClient(engine, service)
        self._http = http
        self._app: FastAPI = create_app(self._client, http)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._tasks: set[asyncio.Task[None]] = set()
        await self._client.start()
        await self._client.ready()

    def check_health(self) -> None:
        """Ray's probe: raises RuntimeError where `/health` would be 503."""
        if self._client.state not in (EngineState.READY, EngineState.DRAINING):
            raise RuntimeError(f"the engine is {self._client.state}: {self._client.reason}")

    def metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics in Prometheus' format."""
        return self._name, self._app.state.metrics.render().decode()

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """Run a request through the API. Yields the head, then the body in pieces. Stops if the caller does."""
        pieces: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        task = asyncio.create_task(self._run(call, pieces, left))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (message := await pieces.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
                    yield Head(message["status"], [*headers, (b"x-replica", self._name.encode())])
                elif body := message.get("body"):
                    yield body
            await task
        finally:
            left.set()

    async def __del__(self) -> None:
        """Stop the engine. Ray calls this when it retires a replica whose requests have ended."""
        await self._client.stop(self._http.shutdown_timeout)

    async def _run(self, call: Call, pieces: asyncio.Queue[Message | None], left: asyncio.Event) -> None:
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            pieces.put_nowait(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": call.method,
            "path": call.path,
            "raw_path": call.path.encode(),
            "query_string": call.query,
            "root_path": "",
            "headers": call.headers,
            "client": None,
            "server": None,
        }
        try:
            await self._app(scope, receive, send)
        finally:
            pieces.put_nowait(None)
