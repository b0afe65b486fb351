"""What crosses between host and device in a pass: one copy there with its integers, one copy back with its results.

A pass whose results the host does not need may wait for the copy of the next one: its integers go along.

On a GPU the host's side is pinned memory, so that neither copy goes through another buffer. On a CPU the device reads
the very memory that the host wrote.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastblt.server.engine.device_queue import DeviceQueue, Mark, Pending

#: int32 tensors of the same size.
Columns = tuple[Tensor, ...]

#: Copies that may be on their way at the same time.
_SLOTS = 8

#: int32 words that passes may have taken which wait for the next copy.
_ROOM = 16384


#: Views of a buffer that are kept.
_VIEWS = 512


class Part:
    """int32 columns [count, size] of a pass: `host` is for the host to write, the tensors are the device's."""

    __slots__ = ("each", "host", "tensor")

    def __init__(self, host: np.ndarray, tensor: Tensor) -> None:
        self.host = host
        self.tensor = tensor
        self.each: Columns = tensor.unbind()


class Staging:
    """The integers of passes. `begin` a pass, `take` its columns and write them, `send` them; then give the work that
    reads them to the queue. Or leave that work to the next copy, which takes the columns along (`then`).

    On a device apart, all passes are read from one buffer at one address, as captured graphs need it: a pass is copied
    there behind the work of the one before. The host writes to one of several buffers in turn, and waits if the copy
    from it is not done. `capacity` bounds the int32 words of a pass there.
    """

    def __init__(self, queue: DeviceQueue, capacity: int = 4096) -> None:
        self._queue = queue
        self._apart = queue.apart
        self._pinned = queue.device.type == "cuda"
        slots = _SLOTS if self._apart else 1
        capacity += _ROOM
        self._buffers = [self._allocate(capacity) for _ in range(slots)]
        self._marks = [Mark() for _ in range(slots)]
        self._inbox = torch.zeros(capacity, dtype=torch.int32, device=queue.device) if self._apart else self._buffers[0]
        # Shapes come again and again, and making a view costs more than writing a small one.
        self._parts: list[dict[tuple[int, int, int], Part]] = [{} for _ in range(slots)]
        self._slot = self._used = 0
        #: What is to be done behind the next copy.
        self._waiting: list[Callable[[], object]] = []
        #: Copies to the device so far.
        self.copies = 0

    def begin(self) -> None:
        """A new pass: what was taken for the last one may be written again once it is sent and done."""
        if self._waiting:
            if self._used <= _ROOM:
                return
            self.send()
        self._used = 0
        if self._apart:
            self._slot = (self._slot + 1) % _SLOTS
            self._marks[self._slot].wait()

    def take(self, count: int, size: int) -> Part:
        """Columns [count, size] for the host to write. Raises MemoryError beyond the capacity of a device apart."""
        first, words = self._used, count * size
        self._used += words
        parts = self._parts[self._slot]
        part = parts.get((first, count, size))
        if part is None:
            if self._used > len(self._buffers[self._slot]):
                self._grow()
                parts = self._parts[self._slot]
            if len(parts) >= _VIEWS:
                # Rare shapes add up over days; those that come often are soon there again.
                parts.clear()
            own = self._buffers[self._slot][first : self._used].view(count, size)
            there = self._inbox[first : self._used].view(count, size) if self._apart else own
            part = parts[first, count, size] = Part(own.numpy(), there)
        return part

    def then(self, work: Callable[[], object]) -> None:
        """Have `work` done directly behind the next copy, which takes along what was taken for it."""
        self._waiting.append(work)

    def send(self) -> None:
        """Copy what was taken since the last copy to the device, and do behind it what waits."""
        works, self._waiting = self._waiting, []
        if not self._apart:
            for work in works:
                work()
            return
        inbox, sent = self._inbox[: self._used], self._buffers[self._slot][: self._used]

        def copy() -> None:
            inbox.copy_(sent, non_blocking=True)
            for work in works:
                work()

        self.copies += 1
        self._queue.run(copy)
        self._marks[self._slot] = self._queue.mark()

    def flush(self) -> None:
        """Send what waits, if anything does."""
        if self._waiting:
            self.send()

    def _allocate(self, words: int) -> Tensor:
        return torch.empty(words, dtype=torch.int32, pin_memory=self._pinned)

    def _grow(self) -> None:
        if self._apart:
            raise MemoryError(f"the integers of a pass take {self._used} words, and there are {len(self._inbox)}")
        # What was taken before keeps the old memory.
        self._buffers[0] = self._inbox = self._allocate(2 * self._used)
        self._parts[0] = {}


class Fetch:
    """Brings a pass's results to the host in one copy, and counts the copies."""

    def __init__(self) -> None:
        self.copies = 0
        self._line: Tensor | None = None

    def __call__(self, pending: Pending[list[Tensor]]) -> list[np.ndarray]:
        """Arrays of the results' shapes. From a GPU they are int32 (which integers must fit) or fp32."""
        self.copies += 1
        results = pending.take()
        if all(result.device.type == "cpu" for result in results):
            return [result.numpy() for result in results]
        packed = self._to_host(self.pack(results))
        arrays: list[np.ndarray] = []
        start = 0
        for result in results:
            part = packed[start : start + result.numel()]
            start += result.numel()
            if result.dtype == torch.float32:
                part = part.view(np.float32)
            arrays.append(part.reshape(result.shape))
        return arrays

    def pack(self, results: list[Tensor]) -> Tensor:
        """All results as one line of 32-bit words, on the device."""
        words = [r.reshape(-1).view(torch.int32) if r.dtype == torch.float32 else r.reshape(-1).int() for r in results]
        return torch.cat(words) if len(words) > 1 else words[0]

    def _to_host(self, words: Tensor) -> np.ndarray:
        size = words.numel()
        if self._line is None or len(self._line) < size:
            self._line = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        line = self._line[:size]
        line.copy_(words, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        # The next results go to the same place.
        return line.numpy().copy()
