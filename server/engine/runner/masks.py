"""Masks for the selection kernels: which ids the constraints of a pass's requests allow at its samples."""

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
    """A constrained request's block: the draft before it, its ids before the step, and the sample where it
    begins.

    `opening` is the sample of the causal row that gives the block's first byte, if one does.
    """

    constraint: Constraint
    draft: abc.Sequence[int]
    ids: abc.Sequence[int]
    first: int
    opening: int | None


class Masks:
    """Allowed ids for every sample of a pass.

    A causal row behind drafted bytes may give what can follow them. An open position of a block may hold what lies on
    a path through the filled ones. Positions that one step fills together may contradict each other: `mend` then
    chooses again.
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
                self._blocks.append(_Block(constraint, sequence.draft, plan.block_ids, first, opening))
                walk = constraint.block(plan.block_ids, sequence.draft)
                masks: list[Mask] = []
                for offset, token in enumerate(plan.block_ids):
                    masks.append(walk.allowed(_filled(plan.block_ids[offset:])))
                    walk.take(token)
                self._write(first, masks)

    def allowed(self, device: torch.device) -> Tensor:
        """The mask on the device, bool [samples, 260]."""
        return torch.from_numpy(self._table).to(device)

    def mend(self, step: Unmasked, opening: Tensor | None, logits: Tensor, params: SelectionParams) -> None:
        """Choose again, from left to right, bytes of a step that contradict those it filled to the left of them.

        Changes `step` in place. `opening` int64 are the ids of the causal samples; `logits` and `params` are those of
        all samples.
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
            walk = block.constraint.block(before, block.draft)
            for offset, token in enumerate(before):
                mask = walk.allowed(_filled(ids[offset:]))
                new = ids[offset] if token == MASK_ID else MASK_ID
                if new != MASK_ID and mask is not None and not mask[new]:
                    sample = block.first + offset
                    own = part(params, slice(sample, sample + 1))
                    own.allowed = torch.tensor(mask, device=logits.device)[None]
                    again = select(logits[sample : sample + 1], own, need_statistics=False)
                    ids[offset] = int(again.ids)
                    step.ids[row, offset] = again.ids[0]
                    step.logprobs[row, offset] = again.logprobs[0]
                walk.take(ids[offset])

    def _write(self, first: int, masks: list[Mask]) -> None:
        for at, mask in enumerate(masks, first):
            if mask is not None:
                self._table[at] = mask


def _filled(ids: abc.Sequence[int]) -> abc.Sequence[int]:
    """Up to the first that is open."""
    return ids[: ids.index(MASK_ID)] if MASK_ID in ids else ids


def part(params: SelectionParams, rows: slice) -> SelectionParams:
    """The parameters of some samples. What no kernel of this pass reads stays as it is."""
    names = ["forbid_eos", "allowed"]
    if params.sampled:
        names += ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    if params.penalized:
        names += ("repetition", "presence", "frequency", "counts", "prompt_seen", "bias")
    values = {name: getattr(params, name) for name in names}
    return replace(params, **{name: value[rows] for name, value in values.items() if value is not None})
