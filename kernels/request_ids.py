"""The ids of running requests, known and drafted: one row for each request, read and written in place.

Shapes: ids int64 [requests, pad + length], where the first `pad` entries of a row are zeros that precede position 0;
owners (rows of `ids`) and positions int32 of one shape.
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
        """The ids at these positions, int64, of the same shape."""
        if (native := self._native()) is None:
            return self.ids.view(-1)[self._places(owners, positions)]
        ids = torch.empty(positions.shape, dtype=torch.int64)
        self._call(native.fastblt_read_ids, owners, positions, ids)
        return ids

    def write(self, owners: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Store int64 ids at these positions [N]. If two have the same place, either may be kept."""
        if (native := self._native()) is None:
            self.ids.view(-1).scatter_(0, self._places(owners, positions), ids)
        else:
            self._call(native.fastblt_write_ids, owners, positions, ids.contiguous())

    def windows(self, owners: Tensor, positions: Tensor) -> Tensor:
        """For each position [N], the pad + 1 ids up to and including its own: [N, pad + 1]."""
        offsets = torch.arange(-self.pad, 1, device=self.ids.device)
        return self.ids.view(-1)[self._places(owners, positions)[:, None] + offsets]

    def _places(self, owners: Tensor, positions: Tensor) -> Tensor:
        """int64: the indices of these positions in the flattened `ids`."""
        return owners.long() * self.ids.shape[1] + (positions + self.pad)

    def _native(self) -> ctypes.CDLL | None:
        return library() if self.ids.device.type == "cpu" and not use_triton(self.ids.device) else None

    def _call(self, function: Callable[..., None], owners: Tensor, positions: Tensor, ids: Tensor) -> None:
        owners, positions = owners.contiguous(), positions.contiguous()
        first = self.ids.data_ptr() + self.pad * self.ids.element_size()
        where = (owners.data_ptr(), positions.data_ptr(), positions.numel())
        function(first, self.ids.stride(0), *where, ids.data_ptr())
