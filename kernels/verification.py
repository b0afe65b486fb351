"""Verification of drafts by equality: the agreeing prefix, and the byte that follows it.

For each of R requests with targets t [K + 1] (what the model itself produces after each accepted prefix), drafts d [K]
and a length l <= K,

    accepted = max { a <= l : d[i] = t[i] for all i < a },      next_id = t[accepted]

so accepted + 1 bytes are known: the agreeing drafts, and the correction or the free byte. What stands in d at l and
beyond is never looked at. There is no rejection sampling: drafts and targets are drawn with the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import launcher


def verify_torch(targets: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted, next_id), int64 [R], of targets int64 [R, K + 1], drafts int64 [R, K] and lengths int64 [R]."""
    drafted = torch.arange(drafts.shape[1], device=drafts.device) < lengths.unsqueeze(-1)
    agree = (drafts == targets[:, :-1]).logical_and_(drafted)
    accepted = agree.cumprod(-1, dtype=torch.int64).sum(-1)
    return accepted, targets.gather(1, accepted.unsqueeze(-1)).squeeze(-1)


#: Picks the implementation for the targets' device.
verify = launcher(verify_torch)
