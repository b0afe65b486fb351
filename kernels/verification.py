"""Verification of drafts by equality: the accepted prefix, and the byte that follows it.

For each of R requests there are targets t [K + 1] (the model's own ids after each prefix of the draft), drafts d [K]
and a length l <= K:

    accepted = max { a <= l : d[i] = t[i] for all i < a },      next_id = t[accepted]

So accepted + 1 new bytes are known: the accepted drafts, and one more byte of the model. Entries of d from l on are
ignored. There is no rejection sampling: drafts and targets are drawn with the same noise.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.native import library


def verify_torch(targets: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted, next_id), int64 [R], of targets int64 [R, K + 1], drafts int64 [R, K] and lengths int64 [R]."""
    drafted = torch.arange(drafts.shape[1], device=drafts.device) < lengths.unsqueeze(-1)
    agree = (drafts == targets[:, :-1]).logical_and_(drafted)
    accepted = agree.cumprod(-1, dtype=torch.int64).sum(-1)
    return accepted, targets.gather(1, accepted.unsqueeze(-1)).squeeze(-1)


def _verify_native(native: ctypes.CDLL, targets: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    accepted, next_id = torch.empty_like(lengths), torch.empty_like(lengths)
    pointers = (tensor.data_ptr() for tensor in (targets, drafts, lengths))
    native.fastblt_verify(*pointers, *drafts.shape, accepted.data_ptr(), next_id.data_ptr())
    return accepted, next_id


def verify(targets: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Like `verify_torch`, by the implementation for the targets' device."""
    if use_triton(targets.device):
        from fastblt.kernels.gpu.verification import verify_triton

        return verify_triton(targets, drafts, lengths)
    if targets.device.type == "cpu" and (native := library()) is not None:
        return _verify_native(native, targets.contiguous(), drafts.contiguous(), lengths.contiguous())
    return verify_torch(targets, drafts, lengths)
