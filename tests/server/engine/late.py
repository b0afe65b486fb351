"""A device that is late: it does its work only when the host asks for a result, or a part of it at any time before.

It runs on the CPU, with memory of its own and a GPU's padding and replays (`FASTBLT_KERNELS=apart`). Whatever a work
reads that the host has changed since, shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastblt.kernels.backend
from fastblt.models.blt import Blt
from fastblt.server.engine import engine as engine_module
from fastblt.server.engine.device_queue import DeviceQueue, Mark, Pending
from fastblt.server.engine.engine import Engine
from fastblt.server.settings import EngineSettings


class LatePending(Pending[Any]):
    """A result that is not there until somebody takes it."""

    __slots__ = ("queue",)

    def __init__(self, queue: LateQueue) -> None:
        self.queue = queue

    def take(self) -> Any:
        if not hasattr(self, "value"):
            self.queue.do()
        return self.value


class LateMark(Mark):
    def __init__(self, queue: LateQueue, given: int) -> None:
        self._queue, self._given = queue, given

    def wait(self) -> None:
        self._queue.do(self._given - self._queue.done)


class LateQueue(DeviceQueue):
    """Keeps what it is given. With `rng` it now and then does a part of it without being asked."""

    def __init__(self, device: torch.device, rng: random.Random | None = None) -> None:
        super().__init__(device)
        self.apart = True
        self._rng = rng
        self._works: list[tuple[Pending[Any], Callable[[], Any]]] = []
        self.done = 0
        #: Called before every work.
        self.before: Callable[[], None] = lambda: None

    def run(self, work: Callable[[], Any]) -> Pending[Any]:
        pending = LatePending(self)
        self._works.append((pending, work))
        if self._rng is not None and self._rng.random() < 0.3:
            self.do(self._rng.randrange(len(self._works)))
        return pending

    def mark(self) -> Mark:
        return LateMark(self, self.done + len(self._works))

    def do(self, count: int | None = None) -> None:
        """The first `count` works, or all."""
        count = len(self._works) if count is None else max(count, 0)
        works, self._works = self._works[:count], self._works[count:]
        for pending, work in works:
            self.before()
            pending.value = work()
            self.done += 1


def late_engine(
    monkeypatch: pytest.MonkeyPatch, model: Blt, settings: EngineSettings, rng: random.Random | None = None
) -> Engine:
    """An engine on a late device."""
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "apart")
    monkeypatch.setattr(engine_module, "DeviceQueue", lambda device: LateQueue(device, rng))
    return Engine(model, settings)
