"""Several bytes of each of N requests in one call, on a CPU, in fp32: a small model's drafts, and its patches.

A step of a request is a decoder row at its position p, and the choice of the byte at p + 1 from that row's state, as in
`kernels.selection` without penalties. Where p + 1 is not the last, the new byte then goes through the encoder, and its
decoder row is the next step. All rows of a request read the same latent. A request whose bytes stay (its open patch
began at `opened`, not -1) has them scanned by the entropy model too, and ends with a byte that closes the patch, or
with EOS. A draft may have the last of its rows scanned when it is whole; its last byte is then encoded too, so that
nothing keeps it from verification.

One call for each step of each module would cost a small model more than the steps' arithmetic, and would read the keys
and values in a request's window from memory for every byte.

Shapes: owners (state rows), starts (position of the first decoder row), latents (slots), limits (most bytes), scans
(of bytes that stay how many may be scanned, of drafts how many rows are), opened, fresh (1 where the first row is still
to be encoded): int32 [N], the rows of one array.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.choice import Choices, Draws
from fastblt.kernels.cpu.dense import Packed
from fastblt.kernels.cpu.native import require
from fastblt.kernels.cpu.stack import PackedStack, Sink, Source, latents_of
from fastblt.kernels.cpu.structs import Places, Spent
from fastblt.kernels.cpu.threads import threads
from fastblt.kernels.request_ids import RequestIds

#: The columns of a call's array.
COLUMNS = ("owners", "starts", "latents", "limits", "scans", "opened", "fresh")
OWNERS, STARTS, LATENTS, LIMITS, SCANS, OPENED, FRESH = range(len(COLUMNS))


@dataclass(frozen=True)
class Part:
    """A module over the paged caches of running requests: entropy model, encoder or decoder."""

    stack: PackedStack
    source: Source
    sink: Sink
    caches: ctypes.Array[ctypes.c_void_p]
    places: Places


#: Entropy model, encoder and decoder.
Parts = tuple[Part, Part, Part]


@dataclass(frozen=True)
class Steps:
    """What became of the requests: int32 [N] how many bytes each was given and how many rows were scanned; ids int64
    and entropies (nats) fp32 [N, most or more]; whether a row had no finite choice; what the call spent."""

    made: np.ndarray
    scanned: np.ndarray
    ids: np.ndarray
    entropies: np.ndarray
    bad: np.ndarray
    spent: Spent


class MultiStep:
    """The call for a model and its caches, all of which must outlive it. Without `encoder_input` drafted rows begin as
    ids, and are not encoded."""

    def __init__(
        self,
        parts: Parts,
        head: Packed,
        ids: RequestIds,
        latents: Tensor,
        draws: Draws,
        *,
        encoder_input: bool,
    ) -> None:
        # What pointers point to must live.
        self._own = (parts, latents)
        self._parts = parts_of(parts)
        self._latents = latents_of(latents)
        self._call = require().fastblt_multi_step
        self._choices = Choices(draws, head, ids)
        #: Whether drafted rows begin as encoder states.
        self.encoder_input = encoder_input

    def __call__(
        self, columns: np.ndarray, threshold: float, longest: int | None, *, sampled: bool, truncated: bool
    ) -> Steps:
        """Steps of the requests in int32 columns [7, N]; a patch closes behind an entropy above the threshold (nats),
        or at its longest. Raises MemoryError."""
        count = columns.shape[1]
        most = int(np.where(columns[OPENED] < 0, columns[[LIMITS, SCANS]], columns[LIMITS]).max())
        made, scanned = np.zeros((2, count), dtype=np.int32)
        bad = np.zeros(count, dtype=np.uint8)
        ids = np.empty((count, most), dtype=np.int64)
        entropies = np.empty((count, most), dtype=np.float32)
        spent = Spent()
        given = [columns[at].ctypes.data for at in range(len(COLUMNS))]
        results = [one.ctypes.data for one in (made, scanned, ids, entropies, bad)]
        if self._call(
            self._parts,
            structs.Requests(*given, *results, count, most),
            self._latents,
            self._choices.of(sampled=sampled, truncated=truncated),
            structs.Rule(threshold, longest or 0, self.encoder_input),
            threads(),
            spent,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        return Steps(made, scanned, ids, entropies, bad, spent)


def parts_of(parts: Parts) -> ctypes.Array[structs.Part]:
    """The modules as the C code takes them; they must outlive it."""
    made = (
        structs.Part(
            ctypes.pointer(part.stack.module),
            part.caches,
            ctypes.pointer(part.places),
            ctypes.pointer(part.source.struct()),
            ctypes.pointer(part.sink.struct()),
        )
        for part in parts
    )
    return (structs.Part * len(parts))(*made)
