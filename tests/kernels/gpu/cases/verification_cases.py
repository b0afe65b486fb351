"""Verification in Triton against the oracle: ragged drafts, none among them, in one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.kernels.verification import verify, verify_torch
from tests.kernels.test_verification import test_written_out  # noqa: F401
from tests.oracles import selection_oracle as oracle


@pytest.mark.parametrize("size", [0, 1, 7, 16, 32, 33])
def test_random_drafts(size: int) -> None:
    rng = np.random.default_rng(size)
    targets = torch.as_tensor(rng.integers(2, 260, (12, size + 1)))
    agree = torch.as_tensor(rng.random((12, size)) < 0.85)
    lengths = torch.as_tensor(rng.integers(0, size + 1, 12))
    lengths[:2] = 0
    agree |= torch.arange(size) >= lengths[:, None]
    drafts = torch.where(agree, targets[:, :-1], 1)
    accepted, next_id = verify(targets, drafts, lengths)
    for r in range(12):
        expected = oracle.verify(targets[r].tolist(), drafts[r].tolist(), int(lengths[r]))
        assert (int(accepted[r]), int(next_id[r])) == expected
    for one, other in zip((accepted, next_id), verify_torch(targets, drafts, lengths), strict=True):
        assert torch.equal(one, other)
