"""What crosses to a device: passes that wait go along with the next copy, in their order."""

from __future__ import annotations

import pytest
import torch

from fastblt.server.engine.device import staging as staging_module
from fastblt.server.engine.device.staging import Staging
from fastblt.server.engine.device_queue import DeviceQueue
from tests.server.engine.late import LateQueue


def test_what_waits_goes_with_the_next_copy() -> None:
    queue = LateQueue(torch.device("cpu"))
    staging, seen = Staging(queue), []
    for value in (3, 4, 5):
        staging.begin()
        part = staging.take(2, 8)
        part.host[:] = value
        if value < 5:
            staging.then(lambda part=part: seen.append(int(part.tensor.sum())))
    staging.send()
    assert staging.copies == 1 and not seen, "a late device has done nothing yet"
    queue.run(lambda: seen.append(int(part.tensor.sum())))
    staging.begin()
    staging.take(2, 8).host[:] = 9
    queue.do()
    assert seen == [48, 64, 80]
    staging.flush()
    assert staging.copies == 1


def test_what_waits_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "_ROOM", 10)
    queue = LateQueue(torch.device("cpu"))
    staging = Staging(queue, capacity=16)
    done = []
    for value in range(4):
        staging.begin()
        staging.take(2, 8).host[:] = value
        staging.then(lambda value=value: done.append(value))
    assert staging.copies == 3
    staging.flush()
    queue.do()
    assert staging.copies == 4 and done == [0, 1, 2, 3]


@pytest.mark.parametrize("apart", [False, True])
def test_shapes_without_end_take_no_memory_without_end(apart: bool) -> None:
    queue = LateQueue(torch.device("cpu")) if apart else DeviceQueue(torch.device("cpu"))
    staging = Staging(queue)
    for count in range(1, 60):
        for size in range(1, 60):
            staging.begin()
            first, second = staging.take(count, size), staging.take(1, size)
            first.host[:], second.host[:] = count, size
            staging.send()
            queue.do() if isinstance(queue, LateQueue) else None
            # Views that were given up go on reading the same memory.
            assert int(first.tensor.sum()) == count * count * size and int(second.tensor.sum()) == size * size
    assert max(map(len, staging._parts)) <= staging_module._VIEWS
