"""Between the passes of a round: the rows of the next pass, and what the bytes of the last one settle.

A round makes several passes of the decoder without the host (design §3, `server/engine/device/rounds.py`). Its R
requests have columns int32 [R]. A request has `causals` rows from position `starts` on, of which the last `selects`
each give a byte, and behind them a block of `sizes` positions, ids int32 [R, B], MASK where one is to be filled. Rows
of a pass are int32 [6, N]: owner, position, `high`, `first` (a row sees [max(0, first - window + 1), high)), latent
slot, and the id of a block row or -1. Rows that nobody has belong to owner 0.

`settle` does what `kernels/cpu/csrc/block_steps.c` does behind a pass: the selected rows' bytes go into the request's
text, as far as they agree with what stands there they confirm it, and the last opens the block; then the rule fixes
masked positions (`unmasking.py`), and a block that is done goes into the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.unmasking import pick_torch

#: Of a pass's rows.
OWNER, POSITION, HIGH, FIRST, LATENT, BLOCK = range(6)


@dataclass
class Chosen:
    """A byte for every row of a pass: ids int64 [N], statistics fp32 [N] (nats), bad uint8 [N], as in `Selection`."""

    ids: Tensor
    confidence: Tensor
    entropy: Tensor
    bad: Tensor


@dataclass
class Stepping:
    """Requests between passes: what they ask for, and what has become of them. int32 [R], if nothing else is said."""

    owners: Tensor
    starts: Tensor
    causals: Tensor
    selects: Tensor
    sizes: Tensor
    latents: Tensor
    rules: Tensor
    lasts: Tensor  # the step that fills all that is left; 0: none does
    mosts: Tensor
    bounds: Tensor  # fp32
    blocks: Tensor  # [R, B]
    fixed: Tensor  # [R, B]: the step that fixed a position, 0: none did
    chosen: Tensor  # [R, S]: the bytes of selected rows
    accepted: Tensor
    steps: Tensor
    bad: Tensor
    left: Tensor  # positions of the block if there is another step, else 0

    @classmethod
    def of(cls, columns: dict[str, Tensor], bounds: Tensor, blocks: Tensor, selected: int) -> Stepping:
        """Requests of which nothing has become yet; `columns` are the first nine fields."""
        count, device = len(bounds), bounds.device
        empty = torch.zeros(4, count, dtype=torch.int32, device=device)
        chosen = torch.zeros(count, max(selected, 1), dtype=torch.int32, device=device)
        return cls(**columns, bounds=bounds, blocks=blocks, fixed=torch.zeros_like(blocks), chosen=chosen, **dict(
            zip(("accepted", "steps", "bad", "left"), empty.unbind(), strict=True)
        ))  # fmt: skip

    @property
    def ends(self) -> Tensor:
        """The positions behind the causal rows, where blocks begin."""
        return self.starts + self.causals


def place_torch(
    rows: Tensor, width: int, owners: Tensor, starts: Tensor, causals: Tensor, sizes: Tensor, latents: Tensor,
    blocks: Tensor | None,
) -> None:  # fmt: skip
    """Writes the rows [6, N] of requests, `width` places for each: causal rows from `starts` on, then block rows."""
    at = torch.arange(rows.shape[1], device=rows.device)
    request = (at // width).clamp_max(len(owners) - 1)
    offset = at - request * width
    causal, start, size = causals[request], starts[request], sizes[request]
    inside, behind = offset < causal + size, offset >= causal
    rows[OWNER] = torch.where(inside, owners[request], 0)
    rows[POSITION] = position = torch.where(inside, start + offset, 0)
    rows[HIGH] = torch.where(inside & behind, start + causal + size, position + 1)
    rows[FIRST] = torch.where(inside & behind, start + causal, position)
    rows[LATENT] = torch.where(inside, latents[request], 0)
    rows[BLOCK] = -1
    if blocks is not None:
        own = blocks[request, (offset - causal).clamp(0, blocks.shape[1] - 1)]
        rows[BLOCK] = torch.where(inside & behind, own, -1)


def settle_torch(made: Chosen, first_rows: Tensor, these: Stepping, texts: RequestIds, step: int, mask: int) -> None:
    """What the bytes of a pass settle, in place. `first_rows` int32 [R]: where the rows of each begin in the pass."""
    rows, last = first_rows[:, None].long(), len(made.ids) - 1
    going = these.left > 0 if step > 1 else torch.ones_like(these.left, dtype=torch.bool)
    owners, ends = these.owners[:, None], these.ends[:, None]
    if step == 1:
        at = torch.arange(these.chosen.shape[1], device=rows.device)
        selects = these.selects[:, None]
        inside = at < selects
        row = (rows + these.causals[:, None] - selects + at).clamp(0, last)
        ids = made.ids[row]
        position = torch.where(inside, ends - selects + 1 + at, 0).int()
        owner = torch.where(inside, owners, 0)
        agree = (texts.read(owner, position) == ids) & (at + 1 < selects)
        these.accepted.copy_(agree.cumprod(-1).sum(-1))
        these.chosen.copy_(torch.where(inside, ids, 0))
        texts.write(owner.reshape(-1), position.reshape(-1), torch.where(inside, ids, 0).reshape(-1))
        these.bad |= _any_of(made.bad[row], inside)
        newest = ids.gather(1, (selects - 1).clamp_min(0).long())[:, 0].int()
        opened = (these.selects > 0) & (these.sizes > 0)
        these.blocks[:, 0] = torch.where(opened, newest, these.blocks[:, 0])
        these.fixed[:, 0] = torch.where(opened, 1, these.fixed[:, 0])
        rows = rows + these.causals[:, None]
    at = torch.arange(these.blocks.shape[1], device=rows.device)
    inside = (at < these.sizes[:, None]) & going[:, None]
    masked = inside & (these.blocks == mask)
    row = (rows + at).clamp(0, last)
    picked = pick_torch(made.confidence[row], made.entropy[row], masked, these.rules, these.bounds, these.lasts == step)
    these.blocks.copy_(torch.where(picked, made.ids[row].int(), these.blocks))
    these.fixed.copy_(torch.where(picked, step, these.fixed))
    these.bad |= _any_of(made.bad[row], masked)
    still = (masked & ~picked).any(-1) & (step < these.mosts)
    these.steps.copy_(torch.where(going, step, these.steps))
    these.left.copy_(torch.where(still, these.sizes, 0))
    done = inside & ~still[:, None]
    owner, position = torch.where(done, owners, 0), torch.where(done, ends + at, 0).int()
    texts.write(owner.reshape(-1), position.reshape(-1), torch.where(done, these.blocks, 0).long().reshape(-1))


def _any_of(bad: Tensor, inside: Tensor) -> Tensor:
    """The reasons of each line's rows, joined."""
    own = torch.where(inside, bad, 0).int()
    return (own & 1).amax(-1) | (own & 2).amax(-1)


def place(
    rows: Tensor, width: int, owners: Tensor, starts: Tensor, causals: Tensor, sizes: Tensor, latents: Tensor,
    blocks: Tensor | None = None,
) -> None:  # fmt: skip
    """As `place_torch`, by the implementation for the rows' device."""
    if use_triton(rows.device):
        from fastblt.kernels.gpu.rounds import place_triton

        place_triton(rows, width, owners, starts, causals, sizes, latents, blocks)
    else:
        place_torch(rows, width, owners, starts, causals, sizes, latents, blocks)


def settle(made: Chosen, first_rows: Tensor, these: Stepping, texts: RequestIds, step: int, mask: int) -> None:
    """As `settle_torch`, by the implementation for the requests' device."""
    if use_triton(first_rows.device):
        from fastblt.kernels.gpu.rounds import settle_triton

        settle_triton(made, first_rows, these, texts, step, mask)
    else:
        settle_torch(made, first_rows, these, texts, step, mask)
