"""Runs the app on a socket until a signal arrives, then lets running requests finish."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import math
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from fastblt.server.api import greeting
from fastblt.server.api.app import create_app
from fastblt.server.api.http import HANDSHAKE_SECONDS, KEEP_ALIVE_SECONDS, limited, max_connections, raise_file_limit
from fastblt.server.logs import progress
from fastblt.server.process.client import EngineClient, EngineState, EngineUnavailableError
from fastblt.server.settings import FailurePolicy, HttpSettings

logger = logging.getLogger("fastblt")

#: Seconds that a client may go without reading what waits for it.
READER_SECONDS = 120.0

#: With fewer connections than this the server logs a warning.
_FEW_CONNECTIONS = 256
#: Most connections at once, or four for each request that may run or wait, if that is more.
_CONNECTIONS = 4096

#: A parameter of glibc's mallopt: blocks of at least the given size get a memory mapping of their own.
_M_MMAP_THRESHOLD = -3

#: Seconds between two words about an engine that is loading.
_TELL_SECONDS = 5

#: Seconds after an abort in which streams are still sent their end.
_LAST_WORDS = 5


class CertificateError(ValueError):
    """A certificate or key file cannot be used for HTTPS."""


class _Server(uvicorn.Server):
    """Shuts down after a signal and, unlike uvicorn's, does not raise it again. Calls `on_signal` for each signal."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.is_ssl:
            # uvicorn has no option for it. A connection is counted, and its head timed, only after the handshake.
            loop = asyncio.get_running_loop()
            create = partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_SECONDS)
            loop.create_server = create  # type: ignore[method-assign]
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._on_signal()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free port.

    Raises OSError. It is called before anything is loaded, so that a port in use is reported at once.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.create_server(address[:2], family=family, backlog=2048)
    # Connections inherit these options. asyncio sets TCP_NODELAY only on sockets that it creates itself. Without it, on
    # a reused connection, the end of every answer waits some 40 ms until the client's system acknowledges its head.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The system closes a connection whose client reads nothing for this long.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(READER_SECONDS * 1000))
    return sock


def configure(client: EngineClient, http: HttpSettings) -> uvicorn.Config:
    """The configuration of the HTTP server for `client`.

    Raises CertificateError if the certificate or key cannot be used, OSError if no more files can be opened.
    """
    config = uvicorn.Config(
        create_app(client, http),
        http=limited(max(_CONNECTIONS, 4 * (client.settings.max_running + client.settings.max_waiting))),
        # Fixed, so that it does not depend on whether uvloop is installed.
        loop="asyncio",
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        ssl_certfile=http.tls_certificate,
        ssl_keyfile=http.tls_key,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(http.shutdown_timeout) + _LAST_WORDS,
    )
    try:
        config.load()
    except OSError as error:
        # SSLError is an OSError. Loading the configuration opens no files other than the certificate and key.
        if http.tls_certificate is None or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise CertificateError(str(error)) from error
    return config


def _return_large_blocks() -> None:
    """Have the C library return the memory of a large body to the system when it is freed.

    By default, glibc raises its threshold after the first large block and keeps later ones, which fragments memory.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 2**10)


async def _tell_that_it_loads(began: float) -> None:
    """Say now and then that the engine still loads, until it is cancelled."""
    while True:
        await asyncio.sleep(_TELL_SECONDS)
        seconds = round(time.monotonic() - began)
        progress.info("still loading after %d s", seconds, extra={"fields": {"seconds": seconds}})


async def serve(client: EngineClient, sock: socket.socket, http: HttpSettings) -> None:
    """Serve `client` on `sock` until SIGINT or SIGTERM.

    Running requests then have `http.shutdown_timeout` seconds to finish. After that, or at a second signal, they are
    aborted.

    Raises EngineUnavailableError when the engine cannot be loaded, or when it is dead for good and the policy is EXIT.
    Under the other policies the server keeps running and answers 503, so that a probe of /health can decide.
    """
    raise_file_limit()
    _return_large_blocks()
    # After every read and write the event loop's thread competes for the interpreter lock. With Python's default it
    # would wait up to 5 ms for another thread each time.
    sys.setswitchinterval(0.0005)
    # Objects made so far live until the end. Freezing them keeps the garbage collector's pauses short.
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
    url = greeting.address(host, port, "https" if config.is_ssl else "http")
    logger.info("listening on %s, loading %s", url, client.settings.model)

    async def announce() -> None:
        began = time.monotonic()
        waiting = loop.create_task(_tell_that_it_loads(began))
        with suppress(EngineUnavailableError):
            try:
                await client.ready()
            finally:
                waiting.cancel()
            fields = greeting.facts(client, url, http) | {"seconds": round(time.monotonic() - began, 1)}
            text = f"ready: {client.model_name} at {url} after {fields['seconds']} s"
            logger.info(text, extra={"fields": fields, "more": greeting.lines(fields)})
        await client.ended()
        if not client.loaded or client.service.on_engine_failure is FailurePolicy.EXIT:
            server.should_exit = True

    tasks.append(asyncio.create_task(announce()))
    await server.serve(sockets=[sock])
    await asyncio.gather(*tasks)
    asked_to_stop = len(tasks) > 1
    if client.state is EngineState.DEAD and not (client.loaded and asked_to_stop):
        raise EngineUnavailableError(client.state, client.reason)
