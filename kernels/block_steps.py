"""Blocks of N requests filled step by step in one call, on a CPU, in fp32.

A step of a request is a pass of the decoder over its block's rows, in the first step behind its causal rows; the
choice of a byte for every masked position, as in `kernels.selection` without penalties; and by the request's rule the
fixing of some of them, as in `kernels.unmasking`. Where the block `opens` behind a causal row, that row's own byte is
its first. A request ends with the step that leaves nothing masked, or with its last.

One call for each step would cost a small model more than the steps' arithmetic.

Shapes: owners (state rows), positions, firsts, highs, latents and block int32 [rows] are the rows of the first passes
as in `server.engine.passes`, those of a request together, its block last. begins (the row where a block begins), sizes,
opens, rules, lasts (the step that fills what is left, 0: none) and mosts (most steps) int32 [N]; bounds fp32 [N].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from kernels import choice
from kernels.choice import Choices, ChoiceStruct, Draws
from kernels.dense import Packed
from kernels.multi_step import Part, PartStruct
from kernels.native import library, threads
from kernels.request_ids import RequestIds
from kernels.stack import LatentsStruct


@dataclass(frozen=True)
class Blocks:
    """What the requests ask for; see the module."""

    begins: np.ndarray
    sizes: np.ndarray
    opens: np.ndarray
    rules: np.ndarray
    lasts: np.ndarray
    mosts: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class Filled:
    """What became of them: ids int64 [N, widest], where still masked [MASK]; the step that fixed each, int32 [N,
    widest] (0: none did); how many steps there were int32 [N]; whether a row had no finite choice, bool [N]. Seconds as
    one thread's, in the decoder and altogether."""

    ids: np.ndarray
    fixed: np.ndarray
    steps: np.ndarray
    bad: np.ndarray
    seconds: tuple[float, float]


class BlockSteps:
    """The call for a model and its caches, all of which must outlive it."""

    def __init__(
        self, decoder: Part, head: Packed, ids: RequestIds, latents: Tensor, draws: Draws, *, mask: int
    ) -> None:
        """`mask` is the id of what is masked."""
        # What pointers point to must live.
        self._own = (decoder, latents)
        self._decoder = PartStruct.of(decoder)
        self._latents = LatentsStruct.of(latents)
        self._choices = Choices(draws, head, ids)
        self._mask = mask
        self._call = _entry()

    def __call__(self, rows: np.ndarray, blocks: Blocks, *, sampled: bool, truncated: bool) -> Filled:
        """Fill blocks behind the int32 rows [6, rows] of their first passes. Raises MemoryError."""
        count, width = len(blocks.sizes), int(blocks.sizes.max())
        ids = np.empty((count, width), dtype=np.int64)
        fixed, steps = np.zeros((count, width), dtype=np.int32), np.empty(count, dtype=np.int32)
        bad = np.zeros(count, dtype=np.uint8)
        seconds = (ctypes.c_double * 2)()
        given = (blocks.begins, blocks.sizes, blocks.opens, blocks.rules, blocks.lasts, blocks.mosts, blocks.bounds)
        results = (ids, fixed, steps, bad)
        first, stride = rows.ctypes.data, rows.strides[0]
        assert self._call is not None
        if self._call(
            self._decoder,
            _Rows(*(first + at * stride for at in range(6))),
            _Blocks(*(one.ctypes.data for one in (*given, *results)), count, width, self._mask),
            self._latents,
            self._choices.of(sampled=sampled, truncated=truncated),
            threads(),
            seconds,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        return Filled(ids, fixed, steps, bad.view(bool), (seconds[0], seconds[1]))


def available() -> bool:
    """Whether the C code is there."""
    return choice.available() and _entry() is not None


class _Rows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("owners", "positions", "firsts", "highs", "latents", "block")]


class _Blocks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("begins", "sizes", "opens", "rules", "lasts", "mosts", "bounds")),
        *((name, ctypes.c_void_p) for name in ("ids", "fixed", "steps", "bad")),
        *((name, ctypes.c_int64) for name in ("count", "width", "mask")),
    ]


@cache
def _entry() -> Callable[..., int] | None:
    """The C function, with its argument types said once."""
    native = library("block_steps")
    if native is None:
        return None
    function = native.fastblt_block_steps
    structs = (ctypes.POINTER(kind) for kind in (PartStruct, _Rows, _Blocks, LatentsStruct, ChoiceStruct))
    function.argtypes = [*structs, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
    function.restype = ctypes.c_int
    return function
