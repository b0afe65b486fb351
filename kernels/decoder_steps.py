"""A pass of the decoder for each of N requests and the choice of bytes from it in one call, on a CPU, in fp32; and
where a request has a block, all further passes that fill it.

A step of a request is a pass over its block's rows, in the first step behind its causal rows, of which the last ones
are selected and give a byte each; the choice of a byte for these and for every masked position, as in
`kernels.selection` without penalties; and by the request's rule the fixing of some of the latter, as in
`kernels.unmasking`. A block behind a selected row has that row's byte as its first. A request ends with the step that
leaves nothing masked, or with its last.

One call for each of these would cost a small model more than its arithmetic.

Shapes: owners (state rows), positions, firsts, highs, latents and block int32 [rows] are the rows of the first passes
as in `server.engine.passes`, those of a request together, its block last. ends (the row behind a request's causal
ones), selects, sizes (of blocks), rules, lasts (the step that fills what is left, 0: none) and mosts (most steps) int32
[N]; bounds fp32 [N].
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
class Plans:
    """What the requests ask for; see the module."""

    ends: np.ndarray
    selects: np.ndarray
    sizes: np.ndarray
    rules: np.ndarray
    lasts: np.ndarray
    mosts: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """What became of them: the bytes of selected rows int64 [N, most of them]; the ids of blocks int64 [N, widest],
    where still masked [MASK]; the step that fixed each, int32 [N, widest] (0: none did); how many steps there were
    int32 [N]; whether a row had no finite choice, bool [N]. Seconds as one thread's, in the decoder and altogether."""

    chosen: np.ndarray
    ids: np.ndarray
    fixed: np.ndarray
    steps: np.ndarray
    bad: np.ndarray
    seconds: tuple[float, float]


class DecoderSteps:
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

    def __call__(self, rows: np.ndarray, plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """The steps of plans over the int32 rows [6, rows] of their first passes. Raises MemoryError."""
        count, selected, width = len(plans.sizes), int(plans.selects.max()), int(plans.sizes.max())
        chosen, ids = np.empty((count, selected), dtype=np.int64), np.empty((count, width), dtype=np.int64)
        fixed, steps = np.zeros((count, width), dtype=np.int32), np.empty(count, dtype=np.int32)
        bad = np.zeros(count, dtype=np.uint8)
        seconds = (ctypes.c_double * 2)()
        given = (plans.ends, plans.selects, plans.sizes, plans.rules, plans.lasts, plans.mosts, plans.bounds)
        results = (chosen, ids, fixed, steps, bad)
        first, stride = rows.ctypes.data, rows.strides[0]
        assert self._call is not None
        if self._call(
            self._decoder,
            _Rows(*(first + at * stride for at in range(6))),
            _Plans(*(one.ctypes.data for one in (*given, *results)), count, selected, width, self._mask),
            self._latents,
            self._choices.of(sampled=sampled, truncated=truncated),
            threads(),
            seconds,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        return Decoded(chosen, ids, fixed, steps, bad.view(bool), (seconds[0], seconds[1]))


def available() -> bool:
    """Whether the C code is there."""
    return choice.available() and _entry() is not None


class _Rows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("owners", "positions", "firsts", "highs", "latents", "block")]


class _Plans(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ends", "selects", "sizes", "rules", "lasts", "mosts", "bounds")),
        *((name, ctypes.c_void_p) for name in ("chosen", "ids", "fixed", "steps", "bad")),
        *((name, ctypes.c_int64) for name in ("count", "selected", "width", "mask")),
    ]


@cache
def _entry() -> Callable[..., int] | None:
    """The C function, with its argument types said once."""
    native = library("decoder_steps")
    if native is None:
        return None
    function = native.fastblt_decoder_steps
    structs = (ctypes.POINTER(kind) for kind in (PartStruct, _Rows, _Plans, LatentsStruct, ChoiceStruct))
    function.argtypes = [*structs, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
    function.restype = ctypes.c_int
    return function
