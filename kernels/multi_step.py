"""Several bytes of each of N requests in one call, on a CPU, in fp32: a small model's drafts, and its patches.

A step of a request is a decoder row at its position p, and the choice of the byte at p + 1 from that row's state, as in
`kernels.selection` without penalties. Where p + 1 is not the last, the new byte then goes through the encoder, and its
decoder row is the next step. All rows of a request read the same latent. A request whose bytes stay (its open patch
began at `opened`, not -1) has them scanned by the entropy model too, and ends with a byte that closes the patch, or
with EOS.

One call for each step of each module would cost a small model more than the steps' arithmetic, and would read the keys
and values in a request's window from memory for every byte.

Shapes: owners (state rows), starts (position of the first decoder row), latents (slots), limits (most bytes), scans
(how many of them are scanned), opened: int32 [N], the rows of one array. The decoder's first rows have been encoded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from kernels import selection
from kernels.dense import Packed
from kernels.native import library, threads
from kernels.paged_attention import Places
from kernels.request_ids import RequestIds
from kernels.stack import LatentsStruct, ModuleStruct, PackedStack, Sink, SinkStruct, Source, SourceStruct

#: The columns of a call's array.
COLUMNS = ("owners", "starts", "latents", "limits", "scans", "opened")
OWNERS, STARTS, LATENTS, LIMITS, SCANS, OPENED = range(len(COLUMNS))

#: A text ends with it.
_EOS = selection.EOS


@dataclass(frozen=True)
class Part:
    """A module over the paged caches of running requests: entropy model, encoder or decoder."""

    stack: PackedStack
    source: Source
    sink: Sink
    caches: ctypes.Array[ctypes.c_void_p]
    places: Places


@dataclass(frozen=True)
class Draws:
    """How bytes are chosen, by state row: values fp32 [>= 3, rows], of them temperature, top-p, min-p; integers int64
    [2, rows], top-k and seed; eos_from int64 [rows], the first position at which EOS may stand."""

    values: Tensor
    integers: Tensor
    eos_from: Tensor


@dataclass(frozen=True)
class Steps:
    """What became of the requests: int32 [N] how many bytes each was given and how many of them were scanned; ids int64
    and entropies (nats) fp32 [N, most]; whether a row had no finite choice. `seconds` of entropy model, encoder and
    decoder, as one thread's."""

    made: np.ndarray
    scanned: np.ndarray
    ids: np.ndarray
    entropies: np.ndarray
    bad: np.ndarray
    seconds: tuple[float, float, float]


class MultiStep:
    """The call for a model and its caches, all of which must outlive it. Without `fed` drafted rows begin as ids, and
    are not encoded."""

    def __init__(
        self,
        patcher: Part,
        encoder: Part,
        decoder: Part,
        head: Packed,
        ids: RequestIds,
        latents: Tensor,
        draws: Draws,
        *,
        fed: bool,
    ) -> None:
        own = [(part, part.source.struct(), part.sink.struct()) for part in (patcher, encoder, decoder)]
        # What pointers point to must live.
        self._own = (own, head, ids, latents, draws)
        self._parts = (_Part * 3)(
            *(
                _Part(
                    ctypes.pointer(part.stack.module),
                    ctypes.cast(part.caches, ctypes.c_void_p),
                    ctypes.pointer(part.places),
                    ctypes.pointer(source),
                    ctypes.pointer(sink),
                )
                for part, source, sink in own
            )
        )
        self._latents = LatentsStruct.of(latents)
        entries = _entries()
        assert entries is not None
        choose, self._call = entries
        temperature, top_p, min_p = (row.data_ptr() for row in draws.values[:3])
        top_k, seeds = (row.data_ptr() for row in draws.integers)
        texts = ids.ids.data_ptr() + ids.pad * ids.ids.element_size()
        last = (draws.eos_from.data_ptr(), texts, ids.ids.stride(0), head.outputs, _EOS)
        #: By whether a row draws, and whether one truncates.
        self._choices = {
            (sampled, truncated): _Choice(
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
        #: Whether drafted rows begin as encoder states.
        self.fed = fed

    def __call__(
        self, columns: np.ndarray, threshold: float, longest: int | None, *, sampled: bool, truncated: bool
    ) -> Steps:
        """Steps of the requests in int32 columns [6, N]; a patch closes behind an entropy above the threshold (nats),
        or at its longest. Raises MemoryError."""
        count, most = columns.shape[1], int(columns[LIMITS].max())
        made, scanned = np.zeros((2, count), dtype=np.int32)
        bad = np.zeros(count, dtype=np.uint8)
        ids = np.empty((count, most), dtype=np.int64)
        entropies = np.empty((count, most), dtype=np.float32)
        seconds = (ctypes.c_double * 3)()
        given = [columns[at].ctypes.data for at in range(len(COLUMNS))]
        results = [one.ctypes.data for one in (made, scanned, ids, entropies, bad)]
        if self._call(
            self._parts,
            _Requests(*given, *results, count, most),
            self._latents,
            self._choices[sampled, sampled and truncated],
            _Rule(threshold, longest or 0, self.fed),
            threads(),
            seconds,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        return Steps(made, scanned, ids, entropies, bad.view(bool), (seconds[0], seconds[1], seconds[2]))


def available() -> bool:
    """Whether the C code is there."""
    return _entries() is not None


class _Part(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.POINTER(ModuleStruct)),
        ("caches", ctypes.c_void_p),
        ("at", ctypes.POINTER(Places)),
        ("source", ctypes.POINTER(SourceStruct)),
        ("sink", ctypes.POINTER(SinkStruct)),
    ]


class _Requests(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*COLUMNS, "made", "scanned", "ids", "entropies", "bad")),
        *((name, ctypes.c_int64) for name in ("count", "most")),
    ]


class _Choice(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("select", "head", "temperature", "top_k", "top_p", "min_p", "seeds")),
        *((name, ctypes.c_void_p) for name in ("eos_from", "texts")),
        *((name, ctypes.c_int64) for name in ("stride", "vocabulary", "eos")),
    ]


class _Rule(ctypes.Structure):
    _fields_ = [("threshold", ctypes.c_double), ("longest", ctypes.c_int64), ("fed", ctypes.c_int64)]


@cache
def _entries() -> tuple[Any, Callable[..., int]] | None:
    """The C functions: selection's, which the other calls, and this."""
    native, choose = library("multi_step"), selection.entry()
    if native is None or choose is None:
        return None
    function = native.fastblt_multi_step
    structs = (ctypes.POINTER(kind) for kind in (_Part, _Requests, LatentsStruct, _Choice, _Rule))
    function.argtypes = [*structs, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
    function.restype = ctypes.c_int
    return choose, function
