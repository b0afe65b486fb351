"""A pass of the decoder for each of N requests and the choice of bytes from it in one call, on a CPU, in fp32; and
where a request has a block, all further passes that fill it.

A step of a request is a pass over its block's rows, in the first step behind its causal rows, of which the last ones
are selected and give a byte each; the choice of a byte for these and for every masked position, as in
`fastblt.kernels.selection` without penalties; and by the request's rule the fixing of some of the latter, as in
`kernels.unmasking`. A block behind a selected row has that row's byte as its first. A request ends with the step that
leaves nothing masked, or with its last. If nothing is masked then, its new bytes go on through entropy model and
encoder as far as is asked for; and causal rows that begin as encoder states are encoded first where they were not.

Selected rows over a draft verify it: how many bytes of it they agree with, is told. Behind it a request may draft
anew: the byte after those is a causal row on the latent that the row before it read. Its own byte opens a block of
masks, whose bytes go on as above; or, by the rule SINGLE_ROWS, is the next such row, and so on, as in
`fastblt.kernels.cpu.multi_step`. It does not where the text has ended or would with the next byte.

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
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import sub
from typing import Any

import numpy as np
from torch import Tensor

from fastblt.kernels.cpu import choice
from fastblt.kernels.cpu.choice import Choices, ChoiceStruct, Draws
from fastblt.kernels.cpu.dense import Packed
from fastblt.kernels.cpu.multi_step import Parts, PartStruct, Spent
from fastblt.kernels.cpu.native import library, threads
from fastblt.kernels.cpu.stack import LatentsStruct
from fastblt.kernels.request_ids import RequestIds

#: The columns of a call's array.
COLUMNS = (
    *("owners", "starts", "causals", "selects", "sizes", "latents", "cuts"),
    *("rules", "lasts", "mosts", "encoded", "scanned", "untils", "follows", "lefts"),
)

_SELECTS, _SIZES, _SCANNED, _UNTILS, _FOLLOWS = map(COLUMNS.index, ("selects", "sizes", "scanned", "untils", "follows"))

#: The rule of a draft that is no block.
SINGLE_ROWS = -1


@dataclass(slots=True)
class Plans:
    """What requests ask for: a row of each in the order of `COLUMNS`, its bound, and the rest as the module says."""

    rows: list[tuple[int, ...]]
    bounds: list[float]
    reads: list[tuple[int, int]]
    blocks: list[int]

    def column(self, name: str) -> list[int]:
        """The column of this name."""
        at = COLUMNS.index(name)
        return [row[at] for row in self.rows]


@dataclass(slots=True)
class Made:
    """What became of blocks, or single rows, a line for each: their ids [width or more], where still masked MASK; how
    many steps there were; whether a row had no finite choice; the entropies (nats) of rows from the first that was
    scanned on [most of them]. The step that fixed each of a block is in `fixed` int32 [n, width] (0: none did), which
    the next call takes back."""

    ids: list[list[int]]
    fixed: np.ndarray
    steps: list[int]
    bad: bytes
    entropies: list[list[float]]


@dataclass(slots=True)
class Decoded:
    """What became of the plans: the bytes of selected rows [most of them]; how many bytes of a draft they agree with;
    their blocks; the line of `drafts` that has the draft behind each (-1: there is none), some of whose lines nobody
    has; what the call spent."""

    chosen: list[list[int]]
    accepted: list[int]
    made: Made
    lines: list[int]
    drafts: Made
    spent: Spent


class _Room:
    """Memory for results that grows to what a call needs; they leave it as lists."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype
        self.take(1024)

    def take(self, size: int) -> None:
        """Have room for so many."""
        self.values = np.empty(size, dtype=self._dtype)
        self.pointer = self.values.ctypes.data

    def of(self, size: int) -> int:
        """A pointer to room for so many."""
        if size > len(self.values):
            self.take(2 * size)
        return self.pointer


def _lines(values: list[Any], first: int, count: int, width: int) -> list[list[Any]]:
    """Lines of so many values, the first of which begins at `first`."""
    return [values[at : at + width] for at in range(first, first + count * width, width)] if width else [[]] * count


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
        self._ids, self._numbers, self._entropies = _Room(np.int64), _Room(np.int32), _Room(np.float32)
        #: Whether causal rows begin as encoder states.
        self.fed = fed
        self._call = _entry()

    def __call__(self, plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """The steps of the plans. Raises MemoryError."""
        # Views and pointers of numpy's take longer than the lists: behind a pass all code comes from memory.
        columns, count, cuts = list(zip(*plans.rows, strict=True)), len(plans.rows), len(plans.reads)
        selected, width, behind = max(columns[_SELECTS]), max(columns[_SIZES]), max(columns[_FOLLOWS])
        longest = max(0, *map(sub, columns[_UNTILS], columns[_SCANNED]))
        lines, wide = (count, behind + 1) if behind else (0, 0)
        asked = array("i", chain(chain.from_iterable(columns), chain.from_iterable(plans.reads), plans.blocks))
        bounds = array("f", plans.bounds)
        # As the C code lays them out.
        made_ids, draft_ids = count * selected, count * (selected + width)
        fixed, drafted = 3 * count, count * (3 + width)
        bad = drafted + lines * (1 + wide)
        spent = Spent()
        assert self._call is not None
        if self._call(
            self._parts,
            _Call(
                asked.buffer_info()[0],
                bounds.buffer_info()[0],
                self._ids.of(draft_ids + lines * wide),
                self._numbers.of(bad + (count + lines + 3) // 4),
                self._entropies.of(count * longest + lines * wide),
                *(count, cuts, selected, width, longest, behind, self._mask, self.fed),
            ),
            self._latents,
            self._choices.of(sampled=sampled, truncated=truncated),
            threads(),
            spent,
        ):
            raise MemoryError("a module could not allocate its scratch space")
        ids = self._ids.values[: draft_ids + lines * wide].tolist()
        entropies = self._entropies.values[: count * longest + lines * wide].tolist()
        numbers = self._numbers.values
        own, failed = numbers[:fixed].tolist(), numbers[bad : bad + (count + lines + 3) // 4].tobytes()
        made = Made(
            _lines(ids, made_ids, count, width),
            numbers[fixed:drafted].reshape(count, width),
            own[2 * count :],
            failed[:count],
            _lines(entropies, 0, count, longest),
        )
        drafts = Made(
            _lines(ids, draft_ids, lines, wide),
            numbers[drafted + lines : bad].reshape(lines, wide),
            numbers[drafted : drafted + lines].tolist(),
            failed[count : count + lines],
            _lines(entropies, count * longest, lines, wide),
        )
        chosen = _lines(ids, 0, count, selected)
        return Decoded(chosen, own[:count], made, own[count : 2 * count], drafts, spent)


def available() -> bool:
    """Whether the C code is there."""
    return choice.available() and _entry() is not None


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("asked", "bounds", "ids", "numbers", "entropies")),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "cuts", "selected", "width", "longest", "behind", "mask", "fed")
        ),
    ]


@cache
def _entry() -> Callable[..., int] | None:
    """The C function, with its argument types said once."""
    native = library("decoder_steps")
    if native is None:
        return None
    function = native.fastblt_decoder_steps
    structs = (ctypes.POINTER(kind) for kind in (PartStruct, _Call, LatentsStruct, ChoiceStruct))
    function.argtypes = [*structs, ctypes.c_int64, ctypes.POINTER(Spent)]
    function.restype = ctypes.c_int
    return function
