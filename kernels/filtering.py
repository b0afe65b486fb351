"""Between the passes of drafts within a round on a device: whose row is next, and what the last inner round gave.

Single rows (BLT-S): each drafted byte is the next row. Filtered drafts (BLT-DSV, docs/methods.md) have inner rounds: a
causal row, whose own byte opens a block of masks, then causal rows over the block's bytes, which keep those that they
agree with and correct the next. All tensors of R requests are int32 [R], if nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.decoder_steps import ALONE, CORRECTED, PASSED
from fastblt.kernels.rounds import Stepping

#: Missing bytes up to which single rows take as few passes as a block and its filter; as in
#: `kernels/cpu/csrc/filtered.c`.
FEW = 2


@dataclass
class Filtering:
    """Filtered drafts on their way. `block` and `filter` are the requests in an inner round's passes: of a request that
    takes part `block` has one causal row, and `filter` as many as the block has positions."""

    starts: Tensor  # position of the byte that each draft stands over
    wanted: Tensor  # how long it is to be (0: there is none)
    longest: Tensor  # its longest block
    done: Tensor  # how many bytes it has
    steps: Tensor  # how many passes gave them
    bad: Tensor
    origins: Tensor  # [R, W]: how each byte was made, 0: it is not there
    block: Stepping
    filter: Stepping


def turn_torch(these: Filtering, mask: int) -> None:
    """Adds what the last inner round gave, if there was one, and begins the next one of who misses more than FEW bytes,
    in place."""
    block, rows = these.block, these.filter
    took_part, done = block.causals > 0, these.done[:, None]
    at = torch.arange(these.origins.shape[1], device=done.device)
    end = done + 1 + rows.accepted[:, None]
    origin = torch.where(at == done, ALONE, torch.where(at < end, PASSED, CORRECTED)).int()
    new = took_part[:, None] & (at >= done) & (at <= end)
    these.origins.copy_(torch.where(new, origin, these.origins))
    these.done += torch.where(took_part, rows.accepted + 2, 0)
    these.steps += torch.where(took_part, block.steps + 1, 0)
    these.bad |= torch.where(took_part, block.bad | rows.bad, 0)
    missing = these.wanted - these.done
    active = (missing > FEW) & (these.bad == 0)
    block.starts.copy_(these.starts + these.done)
    block.causals.copy_(active)
    block.sizes.copy_(torch.where(active, torch.minimum(these.longest, missing - 1), 0))
    rows.starts.copy_(block.starts + 1)
    block.blocks.fill_(mask)
    for cleared in (block.fixed, block.bad, rows.bad):
        cleared.zero_()


def next_rows_torch(rows: Stepping, starts: Tensor, limits: Tensor, done: Tensor) -> None:
    """Counts the rows of the last pass into `done`, and lays the next one over the newest byte of who has not reached
    its limit and has no bad row, in place."""
    done += rows.causals
    rows.starts.copy_(starts + done)
    rows.causals.copy_((done < limits) & (rows.bad == 0))


def turn(these: Filtering, mask: int) -> None:
    """As `turn_torch`. `block.causals` and `block.selects`, and `block.sizes` with both columns of `filter`, are the
    same memory."""
    if use_triton(these.done.device):
        from fastblt.kernels.gpu.filtering import turn_triton

        turn_triton(these, mask)
    else:
        turn_torch(these, mask)


def next_rows(rows: Stepping, starts: Tensor, limits: Tensor, done: Tensor) -> None:
    """As `next_rows_torch`. `rows.causals` and `rows.selects` are the same memory."""
    if use_triton(done.device):
        from fastblt.kernels.gpu.filtering import next_rows_triton

        next_rows_triton(rows, starts, limits, done)
    else:
        next_rows_torch(rows, starts, limits, done)
