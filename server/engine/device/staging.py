"""What crosses between host and device in a pass: one copy there with its integers, one copy back with its results.

On a GPU the host's side is pinned memory, so that the copy there needs no wait; on a CPU the device reads the very
memory that the host wrote.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: int32 tensors of the same size.
Columns = tuple[Tensor, ...]


class Staging:
    """A buffer of int32 columns for one kind of pass.

    It may be written again once the pass's results were fetched, for then the device has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._here = device.type == "cpu"
        self._allocate(4096)

    def columns(self, count: int, size: int) -> np.ndarray:
        """int32 [count, size] to be written by the host."""
        if count * size > len(self._array):
            self._allocate(2 * count * size)
        views = self._views.get((count, size))
        if views is None:
            words = count * size
            sent = self._buffer[:words].view(count, size)
            views = self._views[count, size] = sent, sent.unbind(), self._array[:words].reshape(count, size)
        self._sent, self._each, columns = views
        return columns

    def send(self) -> Tensor:
        """The columns on the device, int32 [count, size]."""
        return self._sent if self._here else self._sent.to(self._device, non_blocking=True)

    def send_each(self) -> Columns:
        """The columns on the device, one tensor [size] each."""
        return self._each if self._here else self.send().unbind()

    def _allocate(self, words: int) -> None:
        self._buffer = torch.empty(words, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._array: np.ndarray = self._buffer.numpy()
        # Shapes come again and again, and making a view costs more than writing a small one.
        self._views: dict[tuple[int, int], tuple[Tensor, Columns, np.ndarray]] = {}


class Fetch:
    """Brings a pass's results to the host in one copy, and counts the copies."""

    def __init__(self) -> None:
        self.copies = 0

    def __call__(self, *results: Tensor) -> list[np.ndarray]:
        """Arrays of the results' shapes. From a device they are int32 (which integers must fit) or fp32."""
        self.copies += 1
        if all(result.device.type == "cpu" for result in results):
            return [result.numpy() for result in results]
        packed: np.ndarray = self.pack(results).cpu().numpy()
        arrays: list[np.ndarray] = []
        start = 0
        for result in results:
            part = packed[start : start + result.numel()]
            start += result.numel()
            if result.dtype == torch.float32:
                part = part.view(np.float32)
            arrays.append(part.reshape(result.shape))
        return arrays

    def pack(self, results: tuple[Tensor, ...]) -> Tensor:
        """All results as one line of 32-bit words, on the device."""
        words = [r.reshape(-1).view(torch.int32) if r.dtype == torch.float32 else r.reshape(-1).int() for r in results]
        return torch.cat(words) if len(words) > 1 else words[0]
