"""A case of `fastblt.benchmarks.kernels.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Case:
    """A call of an operation. `fused` returns the tensors that it made; `arguments` are the tensors that it got. The
    kernel may move `most` times the least bytes."""

    name: str
    fused: Callable[[], list[Tensor]]
    unfused: Callable[[], Any]
    arguments: list[Tensor]
    most: float = 1.25


def tensors(value: Any) -> list[Tensor]:
    """The tensors in the fields of a dataclass."""
    return [item for item in vars(value).values() if isinstance(item, Tensor)]


def fused(kernel: Callable[..., Any], *given: Any, **options: Any) -> Callable[[], list[Tensor]]:
    """A call of a kernel that returns the tensors it made: none where it works in place."""

    def call() -> list[Tensor]:
        made = kernel(*given, **options)
        if made is None:
            return []
        return [made] if isinstance(made, Tensor) else list(made) if isinstance(made, tuple) else tensors(made)

    return call
