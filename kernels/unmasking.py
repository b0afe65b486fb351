"""One step of unmasking blocks: which masked positions become bytes, and which bytes.

R requests, each with a block of B positions (shorter blocks are padded by positions that are not masked). Every
position is selected as any row is (see `selection`); of the masked ones those are fixed that the request's rule picks
from the row's confidence or entropy H, never from the drawn value:

    0 confidence      all with confidence > bound (strictly); if none, the single most confident
    1 entropy         ascending in H, the largest prefix with H_1 + ... + H_k <= bound; if none, the first
    2 exclusive_max   ascending in H, the largest prefix with H_1 + ... + H_k - max_i<=k H_i <= bound
    3 one_step        all

`last_step` fixes all that is left under any rule. Ties go to the lowest position. So every step fixes at least one
position of a request that has a masked one. Ascending, the maximum of a prefix is its last entry, so the sum of rule 2
is the sum of the prefix one shorter, and its first position always passes (for a bound >= 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.selection import select
from fastblt.kernels.types import NOT_FINITE, NOTHING_LEFT, SelectionParams, Unmasked

CONFIDENCE = 0
ENTROPY = 1
EXCLUSIVE_MAX = 2
ONE_STEP = 3

_INF = float("inf")
_MOST = torch.finfo(torch.float32).max


def pick_torch(
    confidence: Tensor, entropy: Tensor, masked: Tensor, rule: Tensor, bound: Tensor, last_step: Tensor
) -> Tensor:
    """The positions to fix, bool [R, B]: confidence and entropy fp32 [R, B]; rule, bound and last_step [R]."""
    bound = bound.unsqueeze(-1)
    # Positions outside come last in both orders; bad rows (NaN) next to last, so that a step always fixes something.
    confident = confidence.nan_to_num(nan=0.0).masked_fill_(~masked, -1.0)
    uncertain = entropy.nan_to_num(nan=_MOST).masked_fill_(~masked, _INF)
    # The most confident exceeds the bound if any does, so it can always be added.
    best = confident.max(-1, keepdim=True).indices
    by_confidence = (confident > bound).scatter_(1, best, True)
    ascending, order = uncertain.sort(dim=-1, stable=True)
    inclusive = ascending.cumsum(-1, dtype=torch.float64)
    within = inclusive <= bound
    exclusive = inclusive[:, :-1] <= bound
    rule = rule.unsqueeze(-1)
    within[:, 1:] = torch.where(rule == EXCLUSIVE_MAX, exclusive, within[:, 1:])
    within[:, 0] = True
    by_entropy = torch.zeros_like(within).scatter_(1, order, within)
    picked = torch.where(rule == CONFIDENCE, by_confidence, by_entropy)
    everything = (rule == ONE_STEP).logical_or_(last_step.unsqueeze(-1))
    return picked.logical_or_(everything).logical_and_(masked)


def unmask_torch(
    logits: Tensor,
    masked: Tensor,
    ids: Tensor,
    params: SelectionParams,
    rule: Tensor,
    bound: Tensor,
    last_step: Tensor,
    *,
    everything: bool = False,
) -> Unmasked:
    """One step for logits fp32 [R, B, 260], masked bool and ids int64 [R, B], params of R * B rows.

    Rule int64, bound fp32 (of confidence or of entropy) and last_step bool are [R]. `everything` promises that each
    request is under `one_step` or in its last step, so that no statistics are computed.
    """
    shape = masked.shape
    chosen = select(logits.reshape(-1, logits.shape[-1]), params, need_statistics=not everything)
    flaws = chosen.bad.view(shape) * masked
    bad = (flaws & NOT_FINITE).amax(-1) | (flaws & NOTHING_LEFT).amax(-1)
    if chosen.confidence is None or chosen.entropy is None:
        picked, left, done = masked, torch.zeros_like(masked), torch.ones_like(last_step)
    else:
        picked = pick_torch(chosen.confidence.view(shape), chosen.entropy.view(shape), masked, rule, bound, last_step)
        left = masked & ~picked
        done = left.any(-1).logical_not_()
    return Unmasked(
        ids=torch.where(picked, chosen.ids.view(shape), ids),
        masked=left,
        count=picked.sum(-1),
        done=done,
        logprobs=torch.where(picked, chosen.logprobs.view(shape), float("nan")),
        bad=bad,
    )


def unmask(
    logits: Tensor,
    masked: Tensor,
    ids: Tensor,
    params: SelectionParams,
    rule: Tensor,
    bound: Tensor,
    last_step: Tensor,
    *,
    everything: bool = False,
) -> Unmasked:
    """`unmask_torch` by the implementation for the logits' device."""
    if use_triton(logits.device):
        from fastblt.kernels.gpu.unmasking import unmask_triton

        return unmask_triton(logits, masked, ids, params, rule, bound, last_step, everything=everything)
    return unmask_torch(logits, masked, ids, params, rule, bound, last_step, everything=everything)
