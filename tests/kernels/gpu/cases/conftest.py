"""Fresh memory is poisoned here, and stands on the device under test: FASTBLT_TEST_DEVICE, or the interpreter's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from fastblt.kernels.backend import interpreted, use_triton
from tests.kernels.poison import poison

DEVICE = torch.device(os.environ.get("FASTBLT_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def compiled_or_interpreted() -> None:
    assert use_triton(DEVICE) and interpreted() == (DEVICE.type == "cpu"), "run by tests/kernels/gpu/test_cases.py"
    # numpy speaks up where a GPU would not.
    warnings.simplefilter("ignore", RuntimeWarning)


@pytest.fixture(autouse=True)
def placed() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poisoned(placed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
