"""Verification against the scalar oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.kernels.verification import verify
from tests.oracles import selection_oracle as oracle


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 16))
def test_random_drafts_equal_the_oracle(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 40))
    targets = torch.as_tensor(rng.integers(2, 260, (requests, size + 1)))
    agree = torch.as_tensor(rng.random((requests, size)) < rng.choice([0.0, 0.5, 0.8, 1.0]))
    # Where no draft stands, the very target does: it must not count.
    lengths = torch.as_tensor(rng.integers(0, size + 1, requests))
    agree |= torch.arange(size) >= lengths[:, None]
    drafts = torch.where(agree, targets[:, :-1], 1)
    accepted, next_id = verify(targets, drafts, lengths)
    assert accepted.dtype == next_id.dtype == torch.int64
    for r in range(requests):
        expected = oracle.verify(targets[r].tolist(), drafts[r].tolist(), int(lengths[r]))
        assert (int(accepted[r]), int(next_id[r])) == expected


@pytest.mark.parametrize(
    ("drafts", "length", "expected"),
    [
        ([5, 6, 7], 3, (3, 8)),
        ([5, 6, 7], 2, (2, 7)),
        ([5, 6, 7], 0, (0, 5)),
        ([9, 6, 7], 3, (0, 5)),
        ([5, 9, 7], 3, (1, 6)),
        ([5, 6, 9], 3, (2, 7)),
    ],
)
def test_written_out(drafts: list[int], length: int, expected: tuple[int, int]) -> None:
    accepted, next_id = verify(torch.tensor([[5, 6, 7, 8]]), torch.tensor([drafts]), torch.tensor([length]))
    assert (accepted.item(), next_id.item()) == expected
