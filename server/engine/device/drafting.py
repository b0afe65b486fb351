"""The drafts behind verifications, within a round on a device apart (`rounds.py`), as in `kernels/cpu/csrc/follow.c`
and `kernels/cpu/csrc/filtered.c`: blocks, single rows, or blocks that the decoder's causal rows filter (BLT-DSV)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.cpu.decoder_steps import ALONE, CORRECTED, PASSED, SINGLE_ROWS, Made
from fastblt.kernels.filtering import FEW, Filtering, next_rows, turn
from fastblt.kernels.rounds import Stepping
from fastblt.kernels.selection import EOS
from fastblt.kernels.unmasking import ONE_STEP
from fastblt.models.vocabulary import MASK_ID

if TYPE_CHECKING:
    from fastblt.server.engine.device.rounds import RoundPasses

#: Most steps of a block.
MOST_STEPS = 4

_ROWS, _BLOCKS, _FILTERED = range(3)


@dataclass(frozen=True)
class Drafts:
    """What the host knows of a round's drafts before it begins: bounds of passes and widths."""

    #: The longest draft, and the most single rows.
    longest: int
    singles: int
    #: Whether there are such, with the most steps of a block.
    blocks: int
    #: Whether there are filtered drafts; their inner rounds, the longest block of one, and its most steps.
    filters: bool
    inner: int
    block: int
    steps: int

    @classmethod
    def of(cls, asked: dict[str, np.ndarray], bounds: np.ndarray, gain: float, *, whole: bool) -> Drafts | None:
        """None where nobody drafts. `gain`: bytes that an inner round is likely to give; `whole`: drafts are not to end
        early."""
        most = np.minimum(asked["follows"], asked["lefts"] - 1)
        most = np.where((asked["follows"] > 0) & (most > 0), most, 0)
        if not most.any():
            return None
        filtered, rules = asked["filtered"] > 0, asked["rules"]
        alone, blocks = ~filtered & (rules == SINGLE_ROWS), ~filtered & (rules != SINGLE_ROWS)
        steps = np.where((rules == ONE_STEP) | (asked["lasts"] == 1), 1, MOST_STEPS)
        longest = int((most * filtered).max())
        rounds = longest // 2 if whole else math.ceil(longest / max(gain, 2.0))
        return cls(
            longest=int(most.max()),
            singles=int((np.minimum(most, asked["mosts"]) * alone).max()),
            blocks=int((np.minimum(steps, asked["mosts"]) * blocks * (most > 0)).max()),
            filters=longest > 0,
            inner=min(rounds, longest // 2) if longest > FEW else 0,
            block=int(np.minimum(asked["filtered"], np.maximum(most - 1, 0)).max()),
            steps=int((steps * filtered).max()),
        )


@dataclass
class Drafted:
    """The drafts that were made, N lines; a request without one has size 0."""

    sizes: np.ndarray  # int32 [N]: how long each should be
    made_sizes: np.ndarray  # int32 [N]: how long it is
    ids: np.ndarray  # int32 [N, W], MASK where still masked
    fixed: np.ndarray  # int32 [N, W], as in `Made`
    steps: np.ndarray
    bad: np.ndarray
    entropies: np.ndarray  # fp32 [N, W + 1]

    def made(self) -> Made:
        bad = self.bad.astype(np.uint8).tobytes()
        return Made(self.ids.tolist(), self.fixed, self.steps.tolist(), bad, self.entropies.tolist())

    def passes_beside(self, asked: dict[str, np.ndarray], *, encoder_input: bool) -> tuple[int, int, int]:
        """Rows that were encoded first, scanned, and encoded behind, as in `Spent`; of filtered ones roughly."""
        there = self.sizes > 0
        filtered, alone = there & (asked["filtered"] > 0), asked["rules"] == SINGLE_ROWS
        blocks = there & (asked["filtered"] == 0) & ~alone
        done = there & ~(self.ids == MASK_ID).any(-1)
        short = blocks | filtered
        whole = done & np.where(short, True, self.sizes <= asked["mosts"])
        first = int(there.sum() + self.made_sizes[filtered].sum()) if encoder_input else 0
        each = np.where(blocks, self.sizes + (not encoder_input), int(encoder_input))
        return first, int((self.made_sizes[whole] + 1).sum()), int(each[whole].sum())

    def gain(self) -> float | None:
        """Bytes that an inner round gave, on average."""
        rounds = int((self.fixed == CORRECTED).sum())
        bytes_ = int((self.fixed == PASSED).sum()) + 2 * rounds
        return bytes_ / rounds if rounds and (self.made_sizes > FEW).any() else None


def draft(
    own: RoundPasses, drafts: Drafts, verified: Stepping, columns: dict[str, Tensor], latents: Tensor
) -> list[Tensor]:
    """Make the drafts behind what was `verified`; `latents` int32 [N] are what their rows read. Returns the fields of
    `Drafted`."""
    taken = torch.where(verified.selects > 0, verified.accepted + 1, 0)
    at = torch.arange(verified.chosen.shape[1], device=taken.device)
    ended = ((verified.chosen == EOS) & (at < taken[:, None])).any(-1) | (verified.bad > 0)
    sizes = torch.minimum(columns["follows"], columns["lefts"] - taken - 1)
    sizes = torch.where(ended, 0, sizes).clamp_min(0)
    starts = verified.ends - verified.selects + taken
    filtered, alone = columns["filtered"] > 0, verified.rules == SINGLE_ROWS
    width = drafts.longest
    empty = torch.zeros(len(taken), width, dtype=torch.int32, device=taken.device)
    base = replace(
        verified, starts=starts, latents=latents, blocks=empty, fixed=empty.clone(), bad=torch.zeros_like(taken),
        steps=torch.zeros_like(taken),
    )  # fmt: skip
    state = _State(own, base, sizes)
    if drafts.singles:
        state.single_rows(torch.where(alone & ~filtered, sizes, 0), drafts.singles)
    if drafts.blocks:
        state.blocks(torch.where(alone | filtered, 0, sizes), width, drafts.blocks)
    if drafts.filters:
        state.filtered(torch.where(filtered, sizes, 0), columns["filtered"], drafts)
    return state.results(width)


class _State:
    """Drafts on their way: what becomes of them, int32 [N]."""

    def __init__(self, own: RoundPasses, base: Stepping, sizes: Tensor) -> None:
        self._own, self._base, self._sizes = own, base, sizes
        self._owners, self._starts, self._latents = base.owners, base.starts, base.latents
        self._done = torch.zeros_like(sizes)
        #: Up to where each goes through the entropy model, and from where on through the encoder.
        self._whole = torch.zeros_like(sizes, dtype=torch.bool)
        self._from = self._starts
        self._steps, self._bad = torch.zeros_like(sizes), torch.zeros_like(sizes)
        self._masked: tuple[Tensor, Tensor, Tensor] | None = None
        self._origins = base.fixed
        #: Single rows, which note what is bad of them.
        self._rows = own.single_rows(base.owners, base.latents)

    def single_rows(self, sizes: Tensor, most: int) -> None:
        """Each byte is the next row."""
        limits = torch.minimum(sizes, self._base.mosts)
        self._until(limits, most)
        self._steps = torch.where(sizes > 0, limits, self._steps)
        self._whole |= (sizes > 0) & (sizes <= self._base.mosts)

    def blocks(self, sizes: Tensor, width: int, most: int) -> None:
        """Blocks of masks behind a causal row each, whose own byte opens them."""
        own, ones = self._own, (sizes > 0).int()
        these = self._stepping(self._starts, ones, ones, sizes, width)
        if own.encoder_input:
            own.encode(self._owners, self._starts, ones, 1)
        own.fill_behind(these, 1 + width, most)
        inside = torch.arange(width, device=sizes.device) < sizes[:, None]
        self._masked = (sizes > 0, these.blocks, these.fixed)
        self._whole |= (sizes > 0) & ~((these.blocks == MASK_ID) & inside).any(-1)
        self._done = torch.where(sizes > 0, sizes, self._done)
        self._steps = torch.where(sizes > 0, these.steps, self._steps)
        self._bad |= torch.where(sizes > 0, these.bad, 0)
        self._from = torch.where(sizes > 0, self._starts + int(own.encoder_input), self._from)

    def filtered(self, sizes: Tensor, blocks: Tensor, drafts: Drafts) -> None:
        """Inner rounds: a block, then causal rows over it, which keep what they agree with and correct the next."""
        own, base, width = self._own, self._base, drafts.block
        # What `turn` writes: where the passes begin, who takes part, and how long the blocks are.
        start, behind, active, lengths = torch.zeros(4, len(sizes), dtype=torch.int32, device=sizes.device)
        block = self._stepping(start, active, active, lengths, width)
        rows = self._stepping(behind, lengths, lengths, own.nothing(sizes), width)
        # The last of the steps fills what is left.
        forced = torch.where(base.lasts > 0, base.lasts.clamp_max(drafts.steps), drafts.steps)
        block.lasts = torch.where(base.rules == ONE_STEP, base.lasts, forced)
        block.mosts = torch.full_like(sizes, drafts.steps)
        these = Filtering(
            self._starts, sizes, blocks.contiguous(), self._done, self._steps, self._bad, self._origins, block, rows
        )
        for _ in range(drafts.inner):
            turn(these, MASK_ID)
            if own.encoder_input:
                own.encode(self._owners, start, active, 1)
            own.fill_behind(block, 1 + width, drafts.steps)
            if own.encoder_input:
                own.encode(self._owners, behind, lengths, width)
            own.fill_behind(rows, width, 1)
        turn(these, MASK_ID)
        made = self._done.clone()
        limits = torch.where((sizes - made <= FEW) & (self._bad == 0), sizes, 0)
        at = torch.arange(self._origins.shape[1], device=sizes.device)
        alone = (at >= made[:, None]) & (at < limits[:, None])
        self._origins = torch.where(alone, ALONE, self._origins)
        self._until(limits, FEW)
        self._steps = self._steps + self._done - made
        self._whole |= (sizes > 0) & (self._done > 0) & (self._bad == 0)

    def results(self, width: int) -> list[Tensor]:
        """Take what is whole through entropy model and encoder, and return the fields of `Drafted`."""
        own = self._own
        entropies = own.scan(self._owners, self._starts, torch.where(self._whole, self._done + 1, 0), width + 1)
        # Behind blocks all new bytes, else the last one.
        behind = self._starts + self._done + 1
        last = torch.where(self._is_block, self._from, behind - 1)
        if own.encoder_input or self._masked is not None:
            wanted = self._whole if own.encoder_input else self._whole & self._is_block
            blocks = self._masked is not None
            own.encode(self._owners, last, torch.where(wanted, behind - last, 0), width + 1 if blocks else 1)
        at = torch.arange(width, device=last.device)
        inside = at < self._done[:, None]
        owner = torch.where(inside, self._owners[:, None], 0)
        ids = own.texts.read(owner, torch.where(inside, self._starts[:, None] + 1 + at, 0).int()).int()
        fixed = self._origins
        if self._masked is not None:
            these, blocks_of, fixed_of = self._masked
            ids, fixed = torch.where(these[:, None], blocks_of, ids), torch.where(these[:, None], fixed_of, fixed)
        ids = torch.where(inside, ids, 0)
        return [self._sizes, self._done, ids, fixed, self._steps, self._bad | self._rows.bad, entropies]

    @property
    def _is_block(self) -> Tensor:
        return torch.zeros_like(self._whole) if self._masked is None else self._masked[0]

    def _until(self, limits: Tensor, most: int) -> None:
        """At most `most` single rows of each request, until it has `limits` bytes."""
        own, rows = self._own, self._rows
        for _ in range(most):
            next_rows(rows, self._starts, limits, self._done)
            if own.encoder_input:
                own.encode(self._owners, rows.starts, rows.causals, 1)
            own.next_byte(rows)
        next_rows(rows, self._starts, limits, self._done)

    def _stepping(self, starts: Tensor, causals: Tensor, selects: Tensor, sizes: Tensor, width: int) -> Stepping:
        """Requests with rows from `starts` on, and blocks of masks, of at most `width`."""
        base, count = self._base, len(starts)
        columns = {
            "owners": base.owners, "starts": starts, "causals": causals, "selects": selects, "sizes": sizes,
            "latents": self._latents, "rules": base.rules, "lasts": base.lasts, "mosts": base.mosts,
        }  # fmt: skip
        blocks = torch.full((count, max(width, 1)), MASK_ID, dtype=torch.int32, device=starts.device)
        return Stepping.of(columns, base.bounds, blocks, max(width, 1))
