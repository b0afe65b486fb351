"""Paged storage of vectors, one row for every position of a request.

Shapes: store fp32 or bf16 [slots, d]; table int32 [requests, pages]: its entry p // page_size is the page of
position p, whose slot is page * page_size + p % page_size; owners (rows of the table) and positions int32 [N]; rows
[N, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.structs import Pages


@dataclass(frozen=True)
class PagedRows:
    """A store and its page table."""

    store: Tensor
    table: Tensor
    page_size: int

    @property
    def native(self) -> bool:
        """Whether the C code can use the store."""
        plain = self.store.device.type == "cpu" and self.store.dtype == torch.float32
        return plain and not use_triton(self.store.device)

    def pages(self) -> Pages:
        """The page table as the C code's struct."""
        return Pages(self.table.data_ptr(), self.table.stride(0), self.page_size)

    def slots(self, owners: Tensor, positions: Tensor) -> Tensor:
        """The slots of the rows in the store, int64. `owners` is broadcast against `positions`."""
        page = self.page_size
        return self.table[owners, positions // page].long() * page + positions % page

    def read(self, owners: Tensor, positions: Tensor) -> Tensor:
        """A copy of the rows [N, d]."""
        return self.store[self.slots(owners, positions)]

    def write(self, owners: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Store the rows [N, d]. If two have the same slot, either may be kept."""
        self.store.index_copy_(0, self.slots(owners, positions), rows)
