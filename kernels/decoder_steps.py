"""A pass of the decoder for each of N requests and the choice of bytes from it in one call, on a CPU, in fp32; and
where a request has a block, all further passes that fill it.

A step of a request is a pass over its block's rows, in the first step behind its causal rows, of which the last ones
are selected and give a byte each; the choice of a byte for these and for every masked position, as in
`kernels.selection` without penalties; and by the request's rule the fixing of some of the latter, as in
`kernels.unmasking`. A block behind a selected row has that row's byte as its first. A request ends with the step that
leaves nothing masked, or with its last. If nothing is masked then, its new bytes go on through entropy model and
encoder as far as is asked for; and causal rows that begin as encoder states are encoded first where they were not.

Selected rows over a draft verify it: how many bytes of it they agree with, is told. Behind it a request may draft
anew: the byte after those is a causal row on the latent that the row before it read. Its own byte opens a block of
masks, whose bytes go on as above; or, by the rule SINGLE_ROWS, is the next such row, and so on, as in
`kernels.multi_step`. It does not where the text has ended or would with the next byte.

One call for each of these would cost a small model more than its arithmetic.

Shapes: owners (state rows), starts (position of the first causal row), causals (how many there are), selects, sizes (of
blocks), latents (the slot that a block reads), cuts (how many runs of causal rows read one latent each), rules, lasts
(the step that fills what is left, 0: none), mosts (most steps), encoded and scanned (positions before which text has
been through the modules), untils (those before which it shall have been; 0: as far as it has), follows (the length of
a draft behind a verification, which has its rule, bound, last and most steps or rows; 0: none) and lefts (how many
bytes the text may still get): int32 [N], the rows of one array. bounds fp32 [N]. reads int32 [cuts, 2]: the position
behind a run, and its latent's slot. blocks int32 [sizes].
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
from kernels.multi_step import Parts, PartStruct, Spent
from kernels.native import library, threads
from kernels.request_ids import RequestIds
from kernels.stack import LatentsStruct

#: The columns of a call's array.
COLUMNS = (
    *("owners", "starts", "causals", "selects", "sizes", "latents", "cuts"),
    *("rules", "lasts", "mosts", "encoded", "scanned", "untils", "follows", "lefts"),
)

#: The rule of a draft that is no block.
SINGLE_ROWS = -1


@dataclass(frozen=True)
class Plans:
    """What the requests ask for: `columns`, the rest as the module says."""

    columns: np.ndarray
    bounds: np.ndarray
    reads: np.ndarray
    blocks: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of this name."""
        column: np.ndarray = self.columns[COLUMNS.index(name)]
        return column


@dataclass(frozen=True)
class Made:
    """What became of blocks, or single rows: their ids int64 [n, widest or more], where still masked [MASK]; the step
    that fixed each of a block, int32 likewise (0: none did); how many steps there were int32 [n]; whether a row had no
    finite choice, bool [n]; the entropies (nats) of rows from the first that was scanned on, fp32 [n, most of them]."""

    ids: np.ndarray
    fixed: np.ndarray
    steps: np.ndarray
    bad: np.ndarray
    entropies: np.ndarray

    @classmethod
    def room(cls, count: int, width: int, longest: int) -> Made:
        """Of `count` blocks."""
        return cls(
            np.empty((count, width), dtype=np.int64),
            np.zeros((count, width), dtype=np.int32),
            np.zeros(count, dtype=np.int32),
            np.zeros(count, dtype=np.bool_),
            np.empty((count, longest), dtype=np.float32),
        )


@dataclass(frozen=True)
class Decoded:
    """What became of the plans: the bytes of selected rows int64 [N, most of them]; how many bytes of a draft they
    agree with int32 [N]; their blocks; the line of `drafts` that has the draft behind each, int32 [N] (-1: there is
    none); what the call spent."""

    chosen: np.ndarray
    accepted: np.ndarray
    made: Made
    lines: np.ndarray
    drafts: Made
    spent: Spent


class DecoderSteps:
    """The call for a model and its caches, all of which must outlive it. `mask` is the id of what is masked; without
    `fed` causal rows begin as ids."""

    def __init__(
        self,
        parts: Parts,
        head: Packed,
        ids: RequestIds,
        latents: Tensor,
        draws: Draws,
        *,
        mask: int,
        fed: bool,
    ) -> None:
        # What pointers point to must live.
        self._own = (parts, latents)
        self._parts = PartStruct.all_of(parts)
        self._latents = LatentsStruct.of(latents)
        self._choices = Choices(draws, head, ids)
        self._mask = mask
        #: Whether causal rows begin as encoder states.
        self.fed = fed
        self._call = _entry()

    def __call__(self, plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """The steps of the plans. Raises MemoryError."""
        columns = plans.columns
        count, selected, width = columns.shape[1], int(plans["selects"].max()), int(plans["sizes"].max())
        longest, behind = max(int((plans["untils"] - plans["scanned"]).max()), 0), int(plans["follows"].max())
        chosen = np.empty((count, selected), dtype=np.int64)
        accepted, lines = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
        made = Made.room(count, width, longest)
        drafts = Made.room(count if behind else 0, behind + 1, behind + 1)
        spent = Spent()
        first, stride = columns.ctypes.data, columns.strides[0]
        others = (plans.bounds, plans.reads, plans.blocks, chosen, accepted, lines)
        assert self._call is not None
        if self._call(
            self._parts,
            _Plans(
                *(first + at * stride for at in range(len(COLUMNS))),
                *(one.ctypes.data for one in others),
                *(_Made.of(made), _Made.of(drafts)),
                *(count, selected, self._mask, self.fed),
            ),
            self._latents,
            self._choices.of(sampled=sampled, truncated=truncated),
            threads(),
            spent,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        return Decoded(chosen, accepted, made, lines, drafts, spent)


def available() -> bool:
    """Whether the C code is there."""
    return choice.available() and _entry() is not None


class _Made(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "fixed", "steps", "bad", "entropies")),
        *((name, ctypes.c_int64) for name in ("width", "longest")),
    ]

    @classmethod
    def of(cls, made: Made) -> _Made:
        arrays = (made.ids, made.fixed, made.steps, made.bad, made.entropies)
        return cls(*(array.ctypes.data for array in arrays), made.ids.shape[1], made.entropies.shape[1])


class _Plans(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*COLUMNS, "bounds", "reads", "blocks")),
        *((name, ctypes.c_void_p) for name in ("chosen", "accepted", "lines")),
        *((name, _Made) for name in ("made", "next")),
        *((name, ctypes.c_int64) for name in ("count", "selected", "mask", "fed")),
    ]


@cache
def _entry() -> Callable[..., int] | None:
    """The C function, with its argument types said once."""
    native = library("decoder_steps")
    if native is None:
        return None
    function = native.fastblt_decoder_steps
    structs = (ctypes.POINTER(kind) for kind in (PartStruct, _Plans, LatentsStruct, ChoiceStruct))
    function.argtypes = [*structs, ctypes.c_int64, ctypes.POINTER(Spent)]
    function.restype = ctypes.c_int
    return function
