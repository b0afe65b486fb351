from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import save_checkpoint
from tests.tiny import random_ids, tiny_model


@pytest.fixture(scope="session")
def model() -> Blt:
    return tiny_model(3, block_sizes=(4, 8))


@pytest.fixture(scope="session")
def checkpoint(model: Blt, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Path(tmp_path_factory.mktemp("tiny"))
    save_checkpoint(model, folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return [random_ids(seed, 20 + seed) for seed in range(4)]
