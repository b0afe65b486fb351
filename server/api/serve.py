"""Runs the app on a socket until a signal, then lets the running requests finish."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import math
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from fastblt.server.api.app import create_app
from fastblt.server.api.http import limited, max_connections, raise_file_limit
from fastblt.server.process.client import EngineClient, EngineState, EngineUnavailableError
from fastblt.server.settings import FailurePolicy, HttpSettings

logger = logging.getLogger("fastblt")

#: Seconds for which a client may read nothing of what waits for it.
READER_SECONDS = 120.0

#: Connections that a server for more than one user needs.
_FEW_CONNECTIONS = 256
#: Connections at once; four for each request that may run or wait, if that is more.
_CONNECTIONS = 4096

#: Of glibc's mallopt: blocks from this size on are mapped each for itself.
_M_MMAP_THRESHOLD = -3

#: Seconds for last words: what was aborted still gets its end of stream.
_LAST_WORDS = 5


class CertificateError(ValueError):
    """A certificate or key file that HTTPS cannot be served with."""


class _Server(uvicorn.Server):
    """Ends in an orderly way after a signal, which it does not raise again. `on_signal` is called for each."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._on_signal()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError, before anything has been loaded."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.create_server(address[:2], family=family, backlog=2048)
    # Connections inherit these. asyncio sets the first for sockets of its own making only; without it the end of every
    # answer on a connection that is used again waits some 40 ms for the client's system to acknowledge its head.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The system ends one whose reader takes nothing for so long.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(READER_SECONDS * 1000))
    return sock


def configure(client: EngineClient, http: HttpSettings) -> uvicorn.Config:
    """The HTTP server around `client`. Raises CertificateError for certificates of no use."""
    config = uvicorn.Config(
        create_app(client, http),
        http=limited(max(_CONNECTIONS, 4 * (client.settings.max_running + client.settings.max_waiting))),
        # Not whichever happens to be installed.
        loop="asyncio",
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        ssl_certfile=http.tls_certificate,
        ssl_keyfile=http.tls_key,
        timeout_graceful_shutdown=math.ceil(http.shutdown_timeout) + _LAST_WORDS,
    )
    try:
        config.load()
    except OSError as error:
        # Of which SSLError is one; nothing else of it opens files.
        if http.tls_certificate is None or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise CertificateError(str(error)) from error
    return config


def _return_large_blocks() -> None:
    """Have the C library give the memory of a large body back to the system at its end.

    By itself it learns from the first one to keep such blocks, in pieces that the next may not fit.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 2**10)


async def serve(client: EngineClient, sock: socket.socket, http: HttpSettings) -> None:
    """Serve `client` on `sock` until SIGINT or SIGTERM; running requests have `shutdown_timeout` to finish then, or
    until the next signal, and are aborted.

    Raises EngineUnavailableError when the engine cannot be loaded, or when it is dead for good and the policy is EXIT.
    Under the other policies the server then stays and answers 503: whoever watches /health decides.
    """
    raise_file_limit()
    _return_large_blocks()
    # The event loop asks for its turn after every read and write: it must not wait for threads' 5 ms each time.
    sys.setswitchinterval(0.0005)
    # What is there by now stays: the collector need not look at it again, each time while others wait.
    gc.collect()
    gc.freeze()
    if (most := max_connections()) < _FEW_CONNECTIONS:
        logger.warning("only %d connections at once: the limit of open files is low; raise it (ulimit -n)", most)
    config = configure(client, http)
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        again = len(tasks) > 1
        cast(FastAPI, config.app).state.bodies.close()
        tasks.append(loop.create_task(client.stop(0.0 if again else http.shutdown_timeout)))

    server = _Server(config, lambda: loop.call_soon_threadsafe(on_signal))
    host, port = sock.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    scheme = "https" if config.is_ssl else "http"
    logger.info("listening on %s://%s, loading %s", scheme, where, client.settings.model)

    async def announce() -> None:
        with suppress(EngineUnavailableError):
            await client.ready()
            logger.info("ready: %s", client.model_name)
        await client.ended()
        if not client.loaded or client.service.on_engine_failure is FailurePolicy.EXIT:
            server.should_exit = True

    tasks.append(asyncio.create_task(announce()))
    await server.serve(sockets=[sock])
    await asyncio.gather(*tasks)
    asked_to_stop = len(tasks) > 1
    if client.state is EngineState.DEAD and not (client.loaded and asked_to_stop):
        raise EngineUnavailableError(client.state, client.reason)
