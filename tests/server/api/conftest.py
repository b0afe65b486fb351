from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import ServiceSettings
from tests.server.api.running import MODEL, RunningServer, save_tiny, tiny_settings


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def server(checkpoint: str) -> Iterator[RunningServer]:
    """One server for all tests that leave it as they found it."""
    # A probe between two looks at the metrics would be counted as a test's request.
    service = ServiceSettings(probe_interval=3600.0)
    with RunningServer(EngineClient(tiny_settings(checkpoint, deterministic=True), service, name=MODEL)) as running:
        yield running
        running.assert_all_free()
