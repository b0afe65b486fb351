"""Fresh memory is poisoned here."""

from __future__ import annotations

import warnings

import pytest
import torch

from kernels.backend import interpreted, use_triton
from tests.kernels.poison import poison


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted() and use_triton(torch.device("cpu")), "run by tests/kernels/test_triton_kernels.py"
    # numpy speaks up where a GPU would not.
    warnings.simplefilter("ignore", RuntimeWarning)
    poison(monkeypatch)
