"""Inner rounds and single rows of drafts laid out by Triton, as by torch."""

from __future__ import annotations

import copy

import pytest
import torch

from fastblt.kernels.filtering import Filtering, next_rows_torch, turn_torch
from fastblt.kernels.gpu.filtering import next_rows_triton, turn_triton
from fastblt.kernels.rounds import Stepping
from tests.kernels.gpu.cases.rounds_cases import MASK, REQUESTS, ints, stepping

WIDTH = 12


def filtering(generator: torch.Generator) -> Filtering:
    """Drafts of which some have bytes, some are bad, and some take part in an inner round that has just ended."""
    block, rows = stepping(generator), stepping(generator)
    block.causals = block.selects = ints(generator, 0, 2)
    rows.causals = rows.selects = block.sizes
    for each in (block.steps, block.bad, rows.bad):
        each.copy_(ints(generator, 0, 3) * ints(generator, 0, 2))
    rows.accepted.copy_(torch.minimum(ints(generator, 0, 3), (block.sizes - 1).clamp_min(0)))
    return Filtering(
        starts=ints(generator, 1, 20), wanted=ints(generator, 0, WIDTH + 1), longest=ints(generator, 1, 6),
        done=ints(generator, 0, 6), steps=ints(generator, 0, 9), bad=ints(generator, 0, 2) * ints(generator, 0, 2),
        origins=ints(generator, 0, 4, REQUESTS, WIDTH), block=block, filter=rows,
    )  # fmt: skip


def same(first: object, second: object) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, Stepping):
            same(value, other)
        else:
            assert torch.equal(value, other), name


@pytest.mark.parametrize("seed", range(8))
def test_turns(seed: int) -> None:
    these = filtering(torch.Generator().manual_seed(seed))
    pair = these, copy.deepcopy(these)
    for _ in range(2):
        turn_torch(pair[0], MASK)
        turn_triton(pair[1], MASK)
        same(*pair)


@pytest.mark.parametrize("seed", range(4))
def test_next_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = stepping(generator)
    rows.causals = rows.selects = ints(generator, 0, 2)
    rows.bad.copy_(ints(generator, 0, 2) * ints(generator, 0, 2))
    starts, limits, done = ints(generator, 1, 20), ints(generator, 0, 5), ints(generator, 0, 4)
    other, other_done = copy.deepcopy(rows), done.clone()
    next_rows_torch(rows, starts, limits, done)
    next_rows_triton(other, starts, limits, other_done)
    same(rows, other)
    assert torch.equal(done, other_done)
