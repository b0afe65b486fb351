"""One denoising step of blocks: which masked positions become bytes, and which bytes (arXiv 2605.08044 §3.2).

There are R requests, each with a block of B positions. Shorter blocks are padded with positions that are not masked.
An id is selected for every position as for any row (`selection.py`). The request's rule then picks the masked positions
to fix. It uses the row's confidence or entropy H, never the drawn id:

    0 confidence      all with confidence > bound (strictly); if none, the single most confident
    1 entropy         ascending in H, the largest prefix with H_1 + ... + H_k <= bound; if none, the first
    2 exclusive_max   ascending in H, the largest prefix with H_1 + ... + H_k - max_i<=k H_i <= bound
    3 one_step        all

`last_step` fixes all masked positions under any rule. Ties go to the lowest position. Every step fixes at least one
position of a request that has a masked one. In ascending order the maximum of a prefix is its last entry. So the sum in
rule 2 is that of the prefix without its last entry, and the first position always passes (for a bound >= 0).
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
    # Positions that are not masked come last in both orders, and bad rows (NaN) just before them, so that a step always
    # fixes some masked position.
    confident = confidence.nan_to_num(nan=0.0).masked_fill_(~masked, -1.0)
    uncertain = entropy.nan_to_num(nan=_MOST).masked_fill_(~masked, _INF)
    # Adding the most confident position is right in all cases: if any exceeds the bound, it does.
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
    """One step for logits fp32 [R, B, 260], masked bool and ids int64 [R, B], and params of R * B rows.

    `rule` int64, `bound` fp32 (of confidence, or of entropy in nats) and `last_step` bool are [R]. With `everything`
    the caller guarantees that every request uses `one_step` or is in its last step, so no statistics are needed.
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
    """Like `unmask_torch`, by the implementation for the logits' device."""
    if use_triton(logits.device):
        from fastblt.kernels.gpu.unmasking import unmask_triton

        return unmask_triton(logits, masked, ids, params, rule, bound, last_step, everything=everything)
    return unmask_torch(logits, masked, ids, params, rule, bound, last_step, everything=everything)
