"""What the constraints of a pass's requests forbid its picks: masks for the selection kernels."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.selection import select
from fastblt.kernels.types import SelectionParams, Unmasked
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE
from fastblt.server.engine.constraints.constraint import Constraint, Mask
from fastblt.server.engine.runner.samples import BlockSamples, CausalSamples
from fastblt.server.engine.sequence import Planned


@dataclass
class _Block:
    """A constrained request's block: its ids before the step, and the pick where it begins.

    `opening` is the pick of the causal row that gives its first byte, if one does.
    """

    constraint: Constraint
    ids: abc.Sequence[int]
    first: int
    opening: int | None


class Masks:
    """Masks of a pass's picks.

    A row behind drafted bytes may hold what can follow them. Open positions of a block may hold what lies on a path
    through those that are filled; what one step fills is held against itself afterwards, by `mend`.
    """

    def __init__(self, planned: list[Planned], causal: CausalSamples, blocks: BlockSamples, total: int) -> None:
        self._table = np.ones((total, VOCAB_SIZE), dtype=bool)
        self._blocks: list[_Block] = []
        for at, (sequence, plan) in enumerate(planned):
            constraint = sequence.constraint
            if constraint is None:
                continue
            if plan.samples:
                self._write(causal.first_samples[at], constraint.along(sequence.draft)[-plan.samples :])
            if plan.block_ids:
                first = blocks.first(at)
                opening = causal.first_samples[at] if plan.samples else None
                self._blocks.append(_Block(constraint, plan.block_ids, first, opening))
                walk = constraint.block(plan.block_ids)
                masks: list[Mask] = []
                for token in plan.block_ids:
                    masks.append(walk.allowed())
                    walk.take(token)
                self._write(first, masks)

    def allowed(self, device: torch.device) -> Tensor:
        """bool [picks, 260]."""
        return torch.from_numpy(self._table).to(device)

    def mend(self, step: Unmasked, opening: Tensor | None, logits: Tensor, params: SelectionParams) -> None:
        """Choose again, from left to right, what a step filled in against what it filled to the left of it; in `step`.

        `opening` int64 are the ids of the causal picks; `logits` and `params` belong to all picks.
        """
        if not self._blocks:
            return
        filled, width = step.ids.tolist(), step.ids.shape[1]
        start = len(logits) - step.ids.numel()
        for block in self._blocks:
            row = (block.first - start) // width
            ids = filled[row]
            before = list(block.ids)
            if block.opening is not None and opening is not None:
                before[0] = ids[0] = int(opening[block.opening])
            walk = block.constraint.block(before)
            for offset, token in enumerate(before):
                mask = walk.allowed()
                new = ids[offset] if token == MASK_ID else MASK_ID
                if new != MASK_ID and mask is not None and not mask[new]:
                    pick = block.first + offset
                    own = part(params, slice(pick, pick + 1))
                    own.allowed = torch.tensor(mask, device=logits.device)[None]
                    again = select(logits[pick : pick + 1], own, need_statistics=False)
                    ids[offset] = int(again.ids)
                    step.ids[row, offset] = again.ids[0]
                    step.logprobs[row, offset] = again.logprobs[0]
                walk.take(ids[offset])

    def _write(self, first: int, masks: list[Mask]) -> None:
        for at, mask in enumerate(masks, first):
            if mask is not None:
                self._table[at] = mask


def part(params: SelectionParams, rows: slice) -> SelectionParams:
    """The parameters of some rows; what no row reads stays as it is."""
    names = ["forbid_eos", "allowed"]
    if params.sampled:
        names += ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    if params.penalized:
        names += ("repetition", "presence", "frequency", "counts", "prompt_seen", "bias")
    values = {name: getattr(params, name) for name in names}
    return replace(params, **{name: value[rows] for name, value in values.items() if value is not None})
