"""Loading an engine by its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.server.engine.engine import Engine
from fastblt.server.settings import PRETRAINED
from tests.server.api.running import save_tiny
from tests.server.harness import settings


@pytest.mark.parametrize("dtype", ["float99", "load", ""])
def test_an_unknown_dtype_is_named(dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16"):
        Engine.load(settings(dtype=dtype))


def test_model_names(tmp_path: Path) -> None:
    assert Engine.load(settings(model=save_tiny(tmp_path / "mine"))).model_name == "mine"
    assert Engine.load(settings(model=str(PRETRAINED))).model_name == "fastblt-python"
