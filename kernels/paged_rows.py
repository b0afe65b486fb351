"""Rows of numbers that are kept in pages, one for every position of a request: where they are, reading and writing.

Shapes: store [slots, d]; table int32 [requests, pages], entry p // page_size is the page of position p; owners (rows of
the table) and positions int32 [N]; rows [N, d].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.native import library


class Pages(ctypes.Structure):
    """A page table as the C code takes it; the tensor must outlive it."""

    _fields_ = [("table", ctypes.c_void_p), ("stride", ctypes.c_int64), ("page", ctypes.c_int64)]

    @classmethod
    def of(cls, table: Tensor, page_size: int) -> Pages:
        return cls(table.data_ptr(), table.stride(0), page_size)


@dataclass(frozen=True)
class PagedRows:
    """A store and its page table."""

    store: Tensor
    table: Tensor
    page_size: int

    @property
    def native(self) -> bool:
        """Whether C code may take the store as it lies."""
        plain = self.store.device.type == "cpu" and self.store.dtype == torch.float32
        return plain and not use_triton(self.store.device)

    def slots(self, owners: Tensor, positions: Tensor) -> Tensor:
        """int64: the rows' places in the store; `owners` broadcasts against `positions`."""
        page = self.page_size
        return self.table[owners, positions // page].long() * page + positions % page

    def read(self, owners: Tensor, positions: Tensor) -> Tensor:
        """A copy of the rows [N, d]."""
        if not self.native or (functions := _entries()) is None:
            return self.store[self.slots(owners, positions)]
        rows = self.store.new_empty(len(owners), self.store.shape[1])
        self._call(functions[0], self.store, owners, positions, rows)
        return rows

    def write(self, owners: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Store the rows [N, d]. Where two have one place, either may stay."""
        if not self.native or rows.dtype != torch.float32 or (functions := _entries()) is None:
            self.store.index_copy_(0, self.slots(owners, positions), rows)
            return
        self._call(functions[1], rows.contiguous(), owners, positions, self.store)

    def _call(
        self, function: Callable[..., None], source: Tensor, owners: Tensor, positions: Tensor, target: Tensor
    ) -> None:
        owners, positions = owners.contiguous(), positions.contiguous()
        pages = Pages.of(self.table, self.page_size)
        count, size = len(owners), self.store.shape[1]
        function(source.data_ptr(), pages, owners.data_ptr(), positions.data_ptr(), count, size, target.data_ptr())


@cache
def _entries() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The C functions, with their argument types said once."""
    native = library("paged_rows")
    if native is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    functions = native.fastblt_read_rows, native.fastblt_write_rows
    for function in functions:
        function.argtypes = [pointer, ctypes.POINTER(Pages), pointer, pointer, integer, integer, pointer]
        function.restype = None
    return functions
