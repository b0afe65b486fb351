"""A real server of a tiny random model, for evaluations that ask it over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.engine.client import EngineClient
from tests.server.api.running import MODEL, RunningServer, tiny_settings


@pytest.fixture(scope="session")
def url(checkpoint: str) -> Iterator[str]:
    with RunningServer(EngineClient(tiny_settings(checkpoint), name=MODEL)) as running:
        yield running.url
