"""The distribution of the draws of selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastblt.kernels.selection
from fastblt.kernels.noise import gumbel, mix_seed
from fastblt.kernels.selection import select_torch
from tests.kernels.rows import draws, pack, random_logits
from tests.oracles import selection_oracle as oracle
from tests.oracles.selection_oracle import Row

pytestmark = pytest.mark.usefixtures("path")


def deviation(counts: Tensor, p: Tensor) -> float:
    """Chi-square of the counts of possible ids, in standard deviations from its expectation."""
    possible = p > 0
    assert counts[~possible].sum() == 0
    expected = p[possible] * counts.sum()
    assert expected.min() > 5
    freedom = int(possible.sum()) - 1
    return float((((counts[possible] - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def distribution() -> tuple[Tensor, Tensor]:
    logits = torch.randn(260, generator=torch.Generator().manual_seed(8))
    allowed = logits.double().clone()
    allowed[[0, 1, 3]] = float("-inf")
    return logits, allowed.softmax(0)


DRAWS = 1_000_000
FEWER = 50_000


def test_draws_follow_the_distribution_over_positions() -> None:
    logits, p = distribution()
    ids = draws(logits, torch.full((DRAWS,), mix_seed(1, 0)), torch.arange(DRAWS))
    assert abs(deviation(torch.bincount(ids, minlength=260), p)) < 4
    # Neighboring positions are independent: the pairs of their ids, in 16 classes, fill all cells as they should.
    classes = ids % 16
    q = torch.zeros(16, dtype=torch.float64).index_add_(0, torch.arange(260) % 16, p)
    pairs = torch.bincount(classes[:-1] * 16 + classes[1:], minlength=256)
    assert abs(deviation(pairs, (q[:, None] * q).flatten())) < 4


def test_draws_follow_the_distribution_over_seeds_and_choices() -> None:
    logits, p = distribution()
    seeds = torch.tensor([mix_seed(number // 8, number % 8) for number in range(FEWER)])
    ids = draws(logits, seeds, torch.full_like(seeds, 17))
    assert abs(deviation(torch.bincount(ids, minlength=260), p)) < 4


def test_truncated_draws_follow_the_renormalized_distribution() -> None:
    logits, p = distribution()
    ids = draws(logits, torch.full((FEWER,), mix_seed(2, 0)), torch.arange(FEWER), top_k=20)
    kept = torch.zeros_like(p)
    best = p.topk(20).indices
    kept[best] = p[best] / p[best].sum()
    assert abs(deviation(torch.bincount(ids, minlength=260), kept)) < 4


def shared_words(seeds: Tensor, positions: Tensor) -> Tensor:
    return gumbel(seeds, positions).view(-1, 65, 4)[..., :1].expand(-1, 65, 4).reshape(-1, 260)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda seeds, positions: gumbel(seeds, torch.zeros_like(positions)),
        lambda seeds, positions: gumbel(seeds, positions >> 3),
        lambda seeds, positions: gumbel(seeds, positions & 0xFF),
        shared_words,
        lambda seeds, positions: gumbel(seeds, positions) * 0.9,
    ],
    ids=["position ignored", "position repeated", "position short", "word shared", "noise too small"],
)
def test_wrong_noise_does_not_follow_it(
    wrong: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastblt.kernels.selection, "gumbel", wrong)
    logits, p = distribution()
    ids = draws(logits, torch.full((FEWER,), mix_seed(1, 0)), torch.arange(FEWER), select_torch)
    assert abs(deviation(torch.bincount(ids, minlength=260), p)) > 8


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda seeds, positions: gumbel(seeds & 0xFFFFFFFF, positions),
        lambda seeds, positions: gumbel(seeds ^ positions, torch.zeros_like(positions)),
        lambda seeds, positions: gumbel(seeds, positions).roll(1, -1),
        lambda seeds, positions: gumbel(seeds, positions + 1),
    ],
    ids=["key cut", "position in the key", "ids shifted", "position shifted"],
)
def test_wrong_keys_and_counters_are_told_from_the_right_ones(
    wrong: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that is good noise, but another one, passes a chi-square; the oracle tells it apart."""
    rng = np.random.default_rng(6)
    logits = torch.as_tensor(np.stack([random_logits(rng, "normal") for _ in range(40)]))
    rows = [Row(temperature=2.0, seed=mix_seed(9, i), position=i) for i in range(40)]
    expected = [oracle.select(row_logits.tolist(), row).id for row_logits, row in zip(logits, rows, strict=True)]
    assert select_torch(logits, pack(rows), need_statistics=False).ids.tolist() == expected
    monkeypatch.setattr(fastblt.kernels.selection, "gumbel", wrong)
    assert select_torch(logits, pack(rows), need_statistics=False).ids.tolist() != expected
