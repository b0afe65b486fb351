"""Poisoned memory: whatever a kernel leaves unwritten shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all fresh memory: NaN, -777, and bytes and booleans that are 127."""

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.bool, torch.uint8):
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -777)
        return tensor

    def wrap(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: fill(make(*args, **options))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


def written(result: Any) -> None:
    """Assert that no byte, boolean or integer of a result is poison."""
    for value in vars(result).values():
        if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8):
            assert value.view(torch.uint8).max() <= (1 if value.dtype == torch.bool else 3)
        elif isinstance(value, Tensor) and not value.is_floating_point():
            assert (value != -777).all()
