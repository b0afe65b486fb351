"""The ids of running requests, known and drafted ones: a line for each request, read and written in place.

Shapes: ids int64 [requests, pad + length], where the first `pad` of a line are zeros and stand before its first
position; owners (rows of the ids) and positions int32 of one shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.native import library


@dataclass(frozen=True)
class RequestIds:
    """Ids of requests; see the module for shapes."""

    ids: Tensor
    pad: int

    def read(self, owners: Tensor, positions: Tensor) -> Tensor:
        """The ids of these positions, in their shape."""
        if (native := self._native()) is None:
            return self.ids.view(-1)[self._places(owners, positions)]
        ids = torch.empty(positions.shape, dtype=torch.int64)
        self._call(native.fastblt_read_ids, owners, positions, ids)
        return ids

    def write(self, owners: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Store int64 ids at these positions [N]. Where two are of one place, either may stay."""
        if (native := self._native()) is None:
            self.ids.view(-1).scatter_(0, self._places(owners, positions), ids)
        else:
            self._call(native.fastblt_write_ids, owners, positions, ids.contiguous())

    def windows(self, owners: Tensor, positions: Tensor) -> Tensor:
        """Of each position [N] the last pad + 1 ids, its own last: [N, pad + 1]."""
        offsets = torch.arange(-self.pad, 1, device=self.ids.device)
        return self.ids.view(-1)[self._places(owners, positions)[:, None] + offsets]

    def _places(self, owners: Tensor, positions: Tensor) -> Tensor:
        """int64: where the ids, seen as one line, have those of these positions."""
        return owners.long() * self.ids.shape[1] + (positions + self.pad)

    def _native(self) -> ctypes.CDLL | None:
        return library() if self.ids.device.type == "cpu" and not use_triton(self.ids.device) else None

    def _call(self, function: Callable[..., None], owners: Tensor, positions: Tensor, ids: Tensor) -> None:
        owners, positions = owners.contiguous(), positions.contiguous()
        first = self.ids.data_ptr() + self.pad * self.ids.element_size()
        where = (owners.data_ptr(), positions.data_ptr(), positions.numel())
        function(first, self.ids.stride(0), *where, ids.data_ptr())
