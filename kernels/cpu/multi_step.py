"""Several bytes of each of N requests in one call, on a CPU, in fp32: a small model's drafts, and bytes up to the end
of a patch. One call for each pass would cost a small model more than its arithmetic, and would read the keys and
values in a request's window from memory for every byte.

A step of a request is a decoder row at its position p, and the choice of the byte at p + 1 from that row's state, as
in `kernels/selection.py` without penalties. Unless it is the last, the new byte then goes through the encoder, and
its decoder row is the next step. All rows of a request read the same latent. There are two kinds of requests:

- Bytes that stay (the open patch began at position `opened`): each is scanned by the entropy model. The request ends
  with the byte that closes the patch, with EOS, or at its limit.
- Drafts (`opened` is -1) go on to their limit. A whole draft may then be scanned at once, and its last byte encoded,
  so that it can be verified without another pass.

What is asked for are int32 columns [N], in the order of `COLUMNS`:

    owners, starts   state row of the request, and position of its first decoder row
    latents          slot of the latent that it reads
    limits           most bytes
    scans            of bytes that stay, how many may be scanned; of a draft, how many rows are (0: none)
    opened           where the open patch began, or -1
    fresh            1 where the first row must still be encoded
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
    """What became of the requests; M is the most bytes or scanned rows of one."""

    made: np.ndarray  # int32 [N], how many bytes each was given
    scanned: np.ndarray  # int32 [N], how many rows were scanned
    ids: np.ndarray  # int64 [N, M]
    entropies: np.ndarray  # fp32 [N, M], nats
    bad: np.ndarray  # uint8 [N], why a row had no finite choice (as in `Selection`), or 0
    spent: Spent
    # int32 [N], how many bytes behind those that a step needs went through the encoder; None: the last of drafts that
    # were scanned
    ahead: np.ndarray | None = None


class MultiStep:
    """The call for a model and its caches, all of which must outlive it.

    With `encoder_input` drafted rows begin as encoder states; else as ids, and need no encoder."""

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
        """Steps of the requests in int32 columns [7, N], of which some draw (`sampled`), and some of these truncate
        (`truncated`).

        A patch closes behind an entropy above `threshold` (nats), or when it has `longest` bytes. Raises MemoryError.
        """
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
