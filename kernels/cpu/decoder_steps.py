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

from array import array
from dataclasses import dataclass
from itertools import chain
from operator import sub
from typing import Any

import numpy as np
from torch import Tensor

from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.choice import Choices, Draws
from fastblt.kernels.cpu.dense import Packed
from fastblt.kernels.cpu.multi_step import Parts, parts_of
from fastblt.kernels.cpu.native import require
from fastblt.kernels.cpu.stack import latents_of
from fastblt.kernels.cpu.structs import Spent
from fastblt.kernels.cpu.threads import threads
from fastblt.kernels.request_ids import RequestIds

#: The columns of a call's array; as in decoder_steps.h.
COLUMNS = (
    *("owners", "starts", "causals", "selects", "sizes", "latents", "runs"),
    *("rules", "lasts", "mosts", "encoded", "scanned", "untils", "follows", "lefts"),
)

_SELECTS, _SIZES, _SCANNED, _UNTILS, _FOLLOWS = map(COLUMNS.index, ("selects", "sizes", "scanned", "untils", "follows"))

#: The rule of a draft that is no block.
SINGLE_ROWS = -1


@dataclass(slots=True)
class Plans:
    """What requests ask for."""

    rows: list[tuple[int, ...]]  # a row for each request, in the order of `COLUMNS`
    bounds: list[float]  # of each request's rule
    reads: list[tuple[int, int]]  # of all requests, one behind another: runs (position behind it, slot of its latent)
    blocks: list[int]  # likewise: the ids of blocks

    def column(self, name: str) -> list[int]:
        """The column of this name."""
        at = COLUMNS.index(name)
        return [row[at] for row in self.rows]


@dataclass(slots=True)
class Made:
    """What became of blocks, or of drafts of single rows: a line for each."""

    ids: list[list[int]]  # [width or more], MASK where still masked
    fixed: np.ndarray  # int32 [n, width], the step that fixed each position (0: none did); the next call takes it back
    steps: list[int]  # how many steps there were, or single rows
    bad: bytes  # whether a row had no finite choice
    entropies: list[list[float]]  # nats of rows from the first that was scanned on [most of them]


@dataclass(slots=True)
class Decoded:
    """What became of the plans."""

    chosen: list[list[int]]  # the bytes of selected rows [most of them]
    accepted: list[int]  # how many bytes of a draft they agree with
    made: Made  # the requests' blocks
    lines: list[int]  # the line of `drafts` that has the draft behind each; -1: there is none
    drafts: Made  # some of whose lines nobody has
    spent: Spent


class _Room:
    """Memory for results that grows to what a call needs; they leave it as lists."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype
        self._take(1024)

    def _take(self, size: int) -> None:
        self.values = np.empty(size, dtype=self._dtype)
        self._first, self._each = self.values.ctypes.data, self.values.itemsize

    def have(self, size: int) -> None:
        """Have room for so many."""
        if size > len(self.values):
            self._take(2 * size)

    def at(self, index: int) -> int:
        """A pointer to the value at this place."""
        return self._first + index * self._each


def _lines(values: list[Any], first: int, count: int, width: int) -> list[list[Any]]:
    """Lines of so many values, the first of which begins at `first`."""
    return [values[at : at + width] for at in range(first, first + count * width, width)] if width else [[]] * count


class DecoderSteps:
    """The call for a model and its caches, all of which must outlive it. `mask` is the id of what is masked; without
    `encoder_input` causal rows begin as ids."""

    def __init__(
        self,
        parts: Parts,
        head: Packed,
        ids: RequestIds,
        latents: Tensor,
        draws: Draws,
        *,
        mask: int,
        encoder_input: bool,
    ) -> None:
        # What pointers point to must live.
        self._own = (parts, latents)
        self._parts = parts_of(parts)
        self._latents = latents_of(latents)
        self._choices = Choices(draws, head, ids)
        self._mask = mask
        self._ids, self._numbers, self._entropies = _Room(np.int64), _Room(np.int32), _Room(np.float32)
        #: Whether causal rows begin as encoder states.
        self.encoder_input = encoder_input
        self._call = require().fastblt_decoder_steps

    def __call__(self, plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """The steps of the plans. Raises MemoryError."""
        # Views and pointers of numpy's take longer than the lists: behind a pass all code comes from memory.
        columns, count, runs = list(zip(*plans.rows, strict=True)), len(plans.rows), len(plans.reads)
        selected, width, behind = max(columns[_SELECTS]), max(columns[_SIZES]), max(columns[_FOLLOWS])
        longest = max(0, *map(sub, columns[_UNTILS], columns[_SCANNED]))
        lines, wide = (count, behind + 1) if behind else (0, 0)
        asked = array("i", chain(chain.from_iterable(columns), chain.from_iterable(plans.reads), plans.blocks))
        bounds = array("f", plans.bounds)
        # Ids are those of selected rows, blocks, drafts. Numbers are what is agreed, the lines, steps and fixed of
        # blocks, then of drafts, and behind them the bytes of `bad`.
        made_ids, draft_ids = count * selected, count * (selected + width)
        fixed, drafted = 3 * count, count * (3 + width)
        bad = drafted + lines * (1 + wide)
        self._ids.have(draft_ids + lines * wide)
        self._numbers.have(bad + (count + lines + 3) // 4)
        self._entropies.have(count * longest + lines * wide)
        id_at, number_at, entropy_at = self._ids.at, self._numbers.at, self._entropies.at
        spent = Spent()
        if self._call(
            self._parts,
            structs.Call(
                asked.buffer_info()[0],
                bounds.buffer_info()[0],
                id_at(0),
                number_at(0),
                number_at(count),
                (
                    id_at(made_ids),
                    number_at(fixed),
                    number_at(2 * count),
                    number_at(bad),
                    entropy_at(0),
                    width,
                    longest,
                ),
                (
                    id_at(draft_ids),
                    number_at(drafted + lines),
                    number_at(drafted),
                    number_at(bad) + count,
                    entropy_at(count * longest),
                    wide,
                    wide,
                ),
                *(count, runs, selected, self._mask, self.encoder_input),
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
