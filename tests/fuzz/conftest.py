from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.api.running import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("tiny")))
