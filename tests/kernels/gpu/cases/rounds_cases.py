"""Rows laid out and bytes settled by Triton, as by torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastblt.kernels.gpu.rounds import place_triton, settle_triton
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.rounds import Chosen, Stepping, place_torch, settle_torch

MASK, REQUESTS, WIDTH = 260, 5, 6


def ints(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape or (REQUESTS,), generator=generator, dtype=torch.int32)


def stepping(generator: torch.Generator) -> Stepping:
    sizes, causals = ints(generator, 0, WIDTH), ints(generator, 1, WIDTH)
    hidden = torch.rand(REQUESTS, WIDTH, generator=generator) < 0.6
    blocks = torch.where(hidden, MASK, ints(generator, 4, 260, REQUESTS, WIDTH))
    columns = {
        "owners": torch.randperm(REQUESTS, generator=generator).int() + 1,
        "starts": ints(generator, 1, 20),
        "causals": causals,
        "selects": torch.minimum(ints(generator, 0, WIDTH), causals),
        "sizes": sizes,
        "latents": ints(generator, 0, 9),
        "rules": ints(generator, 0, 4),
        "lasts": ints(generator, 0, 3),
        "mosts": ints(generator, 1, 5),
    }
    bounds = torch.rand(REQUESTS, generator=generator) * 3
    return Stepping.of(columns, bounds, blocks.int(), WIDTH)


@pytest.mark.parametrize("seed", range(4))
def test_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    these = stepping(generator)
    for width, size, blocks in ((2 * WIDTH, 64, these.blocks), (WIDTH, 32, None), (1, 8, None)):
        found = torch.full((2, 6, size), -7, dtype=torch.int32)
        sizes = these.sizes if blocks is not None else torch.zeros_like(these.sizes)
        causals = these.causals.clamp_max(width)
        given = (width, these.owners, these.starts, causals, sizes, these.latents, blocks)
        place_torch(found[0], *given)
        place_triton(found[1], *given)
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("seed", range(6))
def test_bytes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    these = stepping(generator)
    rows = 2 * WIDTH * REQUESTS
    texts = RequestIds(torch.randint(4, 9, (REQUESTS + 1, 70), generator=generator), 3)
    first = torch.arange(REQUESTS, dtype=torch.int32) * 2 * WIDTH
    pairs = [(these, texts), copy.deepcopy((these, texts))]
    for step in (1, 2, 3):
        entropy = torch.rand(rows, generator=generator)
        entropy[::7], entropy[3::9] = float("nan"), 0.25
        made = Chosen(
            torch.randint(4, 9, (rows,), generator=generator), torch.rand(rows, generator=generator), entropy,
            (torch.rand(rows, generator=generator) < 0.1).to(torch.uint8),
        )  # fmt: skip
        for (own, own_texts), settle in zip(pairs, (settle_torch, settle_triton), strict=True):
            settle(made, first, own, own_texts, step, MASK)
        # Nobody reads the null request's text.
        assert torch.equal(pairs[0][1].ids[1:], pairs[1][1].ids[1:]), step
        for name, value in vars(pairs[0][0]).items():
            assert torch.equal(value, getattr(pairs[1][0], name)), (step, name)
