"""The choice of bytes within C calls that go on with them: by each request's own parameters, without penalties."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastblt.kernels import selection
from fastblt.kernels.cpu.dense import Packed
from fastblt.kernels.request_ids import RequestIds


@dataclass(frozen=True)
class Draws:
    """How bytes are chosen, by state row: values fp32 [>= 3, rows], of them temperature, top-p, min-p; integers int64
    [2, rows], top-k and seed; eos_from int64 [rows], the first position at which EOS may stand."""

    values: Tensor
    integers: Tensor
    eos_from: Tensor


class ChoiceStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("select", "head", "temperature", "top_k", "top_p", "min_p", "seeds")),
        *((name, ctypes.c_void_p) for name in ("eos_from", "texts")),
        *((name, ctypes.c_int64) for name in ("stride", "vocabulary", "eos")),
    ]


class Choices:
    """For each kind of batch what C code chooses by. All tensors must outlive it."""

    def __init__(self, draws: Draws, head: Packed, ids: RequestIds) -> None:
        # What pointers point to must live.
        self._own = (draws, head, ids)
        choose: Any = selection.entry()
        temperature, top_p, min_p = (row.data_ptr() for row in draws.values[:3])
        top_k, seeds = (row.data_ptr() for row in draws.integers)
        texts = ids.ids.data_ptr() + ids.pad * ids.ids.element_size()
        last = (draws.eos_from.data_ptr(), texts, ids.ids.stride(0), head.outputs, selection.EOS)
        self._structs = {
            (sampled, truncated): ChoiceStruct(
                ctypes.cast(choose, ctypes.c_void_p),
                head.pointer,
                temperature if sampled else None,
                *((top_k, top_p, min_p) if truncated else (None,) * 3),
                seeds if sampled else None,
                *last,
            )
            for sampled in (False, True)
            for truncated in (False, True)
        }

    def of(self, *, sampled: bool, truncated: bool) -> ChoiceStruct:
        """By whether a row draws, and whether one truncates."""
        return self._structs[sampled, sampled and truncated]


def available() -> bool:
    """Whether the C code is there."""
    return selection.entry() is not None
