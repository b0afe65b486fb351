"""A real server of a tiny random model, for evaluations that ask it over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings, HttpSettings
from tests.server.api.running import MODEL, RunningServer, tiny_settings, until


@contextmanager
def ready(settings: EngineSettings, http: HttpSettings | None = None) -> Iterator[str]:
    """The URL of a server that is ready, which may take long where sandboxed programs and others run beside it."""
    with RunningServer(EngineClient(settings, name=MODEL), http, wait=False) as running:
        until(lambda: running.http.get("/health").status_code == 200, 200)
        yield running.url


@pytest.fixture(scope="session")
def url(checkpoint: str) -> Iterator[str]:
    with ready(tiny_settings(checkpoint)) as url:
        yield url
