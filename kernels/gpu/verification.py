"""Verification of drafts in Triton: one program a request, integers only. `verification` has the mathematics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def verify_kernel(targets, drafts, lengths, target_stride, draft_stride, accepted, next_ids, TILE: tl.constexpr):
    """Program r verifies request r; drafts beyond its length are never read."""
    request = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + request).to(tl.int32)
    i = tl.arange(0, TILE)
    drafted = i < length
    # What stands beyond the length is never read.
    draft = tl.load(drafts + request * draft_stride + i, mask=drafted, other=0)
    target = tl.load(targets + request * target_stride + i, mask=drafted, other=0)
    # The first place that has no agreeing draft: the length itself where all agree.
    agreed = tl.min(tl.where(drafted & (draft == target), TILE, i), 0)
    tl.store(accepted + request, agreed.to(tl.int64))
    tl.store(next_ids + request, tl.load(targets + request * target_stride + agreed))


def verify_triton(targets: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As `verify_torch`."""
    requests, size = drafts.shape
    accepted = torch.empty(requests, dtype=torch.int64, device=drafts.device)
    next_ids = torch.empty_like(accepted)
    if requests:
        verify_kernel[(requests,)](
            targets.contiguous(),
            drafts.contiguous(),
            lengths.contiguous(),
            size + 1,
            size,
            accepted,
            next_ids,
            TILE=max(64, triton.next_power_of_2(size)),
            num_warps=1,
        )
    return accepted, next_ids
