from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastblt.server.llm import LLM
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import ServiceSettings
from tests.server.api.running import MAX_MODEL_LEN, MODEL, RunningServer, save_tiny, tiny_settings


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


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> LLM:
    """The server's model without a server."""
    return LLM(
        checkpoint,
        cache_bytes=2**26,
        max_model_len=MAX_MODEL_LEN,
        threads=1,
        deterministic=True,
        prefix_cache=False,
    )
