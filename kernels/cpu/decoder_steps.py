"""The decoder's passes of a verification, of a block's steps, and of the draft behind a verification, with the choice
of bytes from each, for N requests in one call: on a CPU, in fp32. One call for each pass would cost a small model
more than its arithmetic.

A request has causal rows, of which the last ones may be *selected* (each gives a byte: the free byte of a prompt, or
those that verify a draft), and perhaps a block of masked and filled positions behind them. Its steps are:

1. If causal rows begin as encoder states, those that the encoder has not had go through it.
2. A decoder pass over the causal rows and the block. A byte is chosen for every selected row and every masked
   position, as in `kernels/selection.py` without penalties. The last selected row's byte is the block's first.
3. The request's rule fixes some masked positions (`kernels/unmasking.py`). While some are left, and steps are left,
   another decoder pass over the block alone, and so on from the choice.
4. If nothing is masked any more, the new bytes go through entropy model and encoder as far as is asked for.
5. If the request verified a draft and may draft anew (`follows`): the byte behind the accepted ones is a causal row
   on the latent that the row before it read. Its own byte opens a block of masks, which goes through steps 2 to 4;
   or under the rule SINGLE_ROWS each byte is the next row, as in `kernels/cpu/multi_step.py`; or of a filtered draft
   (BLT-DSV) the block's bytes are causal rows in their turn, which keep those that they agree with and correct the
   next, behind which another block begins. It does not where the text has ended, or would with the next byte.

A request without any row drafts in this way over the byte at its start.

What is asked for are int32 columns [N], in the order of `COLUMNS`:

    owners             state row of the request
    starts, causals    position of its first causal row, and how many there are
    selects            how many of the last of them give a byte
    sizes, latents     positions of its block (0: none), and the slot of the latent that these read
    runs               how many runs of its causal rows read one latent each; `Plans.reads` has them
    rules, lasts       rule of unmasking, and the step that fills whatever is left (0: none does)
    mosts              most steps; under SINGLE_ROWS most rows
    encoded, scanned   positions before which its text has been through encoder and entropy model
    untils             position before which it shall have been through both (0: as far as it has)
    follows            longest draft behind the verification, with the same rule, bound, last and most (0: none)
    lefts              how many bytes its text may still get
    filtered           longest block of a filtered draft (0: drafts are not filtered)
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
    "filtered",
)

_SELECTS, _SIZES, _SCANNED, _UNTILS, _FOLLOWS = map(COLUMNS.index, ("selects", "sizes", "scanned", "untils", "follows"))

#: The rule of a draft that is no block.
SINGLE_ROWS = -1

#: How a byte of a filtered draft was made; as in drafts.h.
ALONE, PASSED, CORRECTED = 1, 2, 3


@dataclass(slots=True)
class Plans:
    """What requests ask for."""

    rows: list[tuple[int, ...]]  # a row for each request, in the order of `COLUMNS`
    bounds: list[float]  # of each request's rule
    reads: list[tuple[int, int]]  # of all requests, one behind another: runs (position behind it, slot of its latent)
    blocks: list[int]  # likewise: the ids of blocks
    allowed: np.ndarray | None = None  # bool [N, most selected rows, 260]: ids that these may give; None: all

    def column(self, name: str) -> list[int]:
        """The column of this name."""
        at = COLUMNS.index(name)
        return [row[at] for row in self.rows]


@dataclass(slots=True)
class Made:
    """What became of blocks, or of drafts of single rows: a line for each."""

    ids: list[list[int]]  # [width or more], MASK where still masked
    # int32 [n, width], the step that fixed each position (0: none did), or of a filtered draft how each byte was made
    # (`ALONE` and so on); the next call takes it back.
    fixed: np.ndarray
    steps: list[int]  # how many steps there were, or single rows
    bad: bytes  # why a row had no finite choice (as in `Selection`), or 0
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
    """The call for a model and its caches, all of which must outlive it.

    `mask` is the id of a masked position. With `encoder_input` causal rows begin as encoder states, else as ids."""

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
        """The steps of all plans, of which some draw (`sampled`), and some of these truncate (`truncated`).

        Raises MemoryError.
        """
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
                None if plans.allowed is None else plans.allowed.ctypes.data,
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
