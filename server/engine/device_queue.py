"""The work that the host gives to a device, which does it in order.

A CPU does it at once. A GPU has only been told of it when the host goes on: whatever a work reads of the host's memory
must stay until it is done. So a work reads what was staged for it (`staging.Staging`), and nothing that the host goes
on to change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from fastblt.kernels.backend import is_apart

T = TypeVar("T")


class Mark:
    """A place in the queue: `wait` returns when all work before it is done."""

    def wait(self) -> None:
        """On a CPU it always is."""


class _EventMark(Mark):
    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class Pending(Generic[T]):
    """What a work returns: on a GPU tensors whose contents are still to come."""

    __slots__ = ("value",)

    value: T

    def take(self) -> T:
        """The result; from here on the host may ask for its contents."""
        return self.value


class DeviceQueue:
    """The queue of one device. `apart`: the device has memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.apart = is_apart(device)

    def run(self, work: Callable[[], T]) -> Pending[T]:
        """Do `work` behind all that was given before."""
        pending = Pending[T]()
        pending.value = work()
        return pending

    def mark(self) -> Mark:
        """The end of the queue as it is now."""
        return _EventMark() if self.device.type == "cuda" else Mark()
