"""Fresh memory is poisoned here: whatever a kernel leaves unwritten shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted, use_triton


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted() and use_triton(torch.device("cpu")), "run by tests/kernels/test_triton_kernels.py"
    # numpy speaks up where a GPU would not.
    warnings.simplefilter("ignore", RuntimeWarning)

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -777)
        return tensor

    def wrap(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: fill(make(*args, **options))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.fixture
def written() -> Callable[[Any], None]:
    """Asserts that no boolean or integer of a result is poison."""

    def check(result: Any) -> None:
        for value in vars(result).values():
            if isinstance(value, Tensor) and value.dtype == torch.bool:
                assert value.view(torch.uint8).max() <= 1
            elif isinstance(value, Tensor) and not value.is_floating_point():
                assert (value != -777).all()

    return check
