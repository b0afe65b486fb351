"""Every kernel, compiled, against its oracle: the cases that the ordinary suite runs under the interpreter."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import NEEDS_GPU
from tests.kernels.gpu.test_cases import run


@NEEDS_GPU
@pytest.mark.parametrize(
    "name",
    [
        "selection",
        "unmasking",
        "verification",
        "attention",
        "hash_embedding",
        "merged",
        "rounds",
        "filtering",
        "row_draws",
    ],
)
def test_kernels(name: str) -> None:
    run(name, device="cuda")
