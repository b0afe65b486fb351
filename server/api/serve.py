"""Runs the app on a socket until a signal, then lets the running requests finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from server.api.app import create_app
from server.engine.client import EngineClient, EngineState, EngineUnavailableError

logger = logging.getLogger("fastblt")


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once. Neither is raised again: both ends are orderly."""
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError, before anything has been loaded."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=2048)


async def serve(
    client: EngineClient, sock: socket.socket, *, shutdown_seconds: float = 30.0, access_log: bool = False
) -> None:
    """Serve `client` on `sock` until SIGINT or SIGTERM; running requests have `shutdown_seconds` to finish then.

    Raises EngineUnavailableError when the engine cannot be loaded. Once an engine that was ready dies, the server stays
    and answers 503: whoever watches /health decides.
    """
    config = uvicorn.Config(
        create_app(client),
        log_config=None,
        access_log=access_log,
        lifespan="on",
        ws="none",
        server_header=False,
        # Whole seconds only; at least one, since 0 would cancel answers that are being written.
        timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
    )
    server = _Server(config)
    host, port = sock.getsockname()[:2]
    logger.info(
        "listening on http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, client.settings.model
    )
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    loading = asyncio.create_task(client.ready())
    failure: EngineUnavailableError | None = None
    try:
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            try:
                loading.result()
                logger.info("ready: %s", client.model_name)
            except EngineUnavailableError as error:
                failure = error if client.state is EngineState.DEAD else None
                server.should_exit = True
        await serving
    finally:
        loading.cancel()
        # Already stopped, unless the server was made to leave at once.
        await client.stop()
    if failure is not None:
        raise failure
