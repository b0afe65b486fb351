"""Unmasking against the scalar oracle: which positions are fixed, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastblt.kernels.selection import select
from fastblt.kernels.types import Unmasked
from fastblt.kernels.unmasking import CONFIDENCE, ENTROPY, EXCLUSIVE_MAX, ONE_STEP, pick_torch, unmask
from tests.kernels.rows import LOGITS, pack, random_logits, random_row
from tests.oracles import selection_oracle as oracle
from tests.oracles.selection_oracle import Row

POISON = 777
INF = float("inf")


def pick(statistics: list[float], rule: int, bound: float, masked: list[bool] | None = None) -> list[int]:
    """The positions that one rule picks in one block whose confidences or entropies are given."""
    values = torch.tensor([statistics])
    # The other statistic is poison: no rule may read it.
    other = torch.full_like(values, float("nan"))
    picked = pick_torch(
        values if rule == CONFIDENCE else other,
        other if rule == CONFIDENCE else values,
        torch.tensor([masked or [True] * len(statistics)]),
        torch.tensor([rule]),
        torch.tensor([bound]),
        torch.tensor([False]),
    )
    return picked[0].nonzero().flatten().tolist()


def test_confidence() -> None:
    assert pick([0.2, 0.8, 0.5, 0.7], CONFIDENCE, 0.5) == [1, 3]
    assert pick([0.2, 0.5, 0.5, 0.1], CONFIDENCE, 0.5) == [1]
    assert pick([0.5, 0.5, 0.5, 0.5], CONFIDENCE, 0.5) == [0]
    assert pick([0.9, 0.3, 0.4, 0.4], CONFIDENCE, 0.7, [False, True, True, True]) == [2]
    assert pick([1.0, 1.0, 0.4, 1.0], CONFIDENCE, 1.0, [False, True, True, True]) == [1]


def test_entropy() -> None:
    # Entropies .1, .9, 1.5 under a bound of 1: two positions inclusively, three by the other rule.
    assert pick([0.125, 0.875, 1.5], ENTROPY, 1.0) == [0, 1]
    assert pick([0.125, 0.875, 1.5], EXCLUSIVE_MAX, 1.0) == [0, 1, 2]
    assert pick([1.5, 0.875, 0.125], ENTROPY, 0.5) == [2]
    assert pick([1.5, 0.875, 0.125], ENTROPY, 0.1) == [2]
    assert pick([1.5, 0.875, 0.125], EXCLUSIVE_MAX, 0.1) == [2]
    assert pick([0.5, 0.5, 0.5, 0.5], ENTROPY, 1.0) == [0, 1]
    assert pick([0.5, 0.5, 0.5, 0.5], EXCLUSIVE_MAX, 1.0) == [0, 1, 2]
    assert pick([2.0, 2.0, 2.0], ENTROPY, 1.0, [False, True, True]) == [1]
    assert pick([0.0, 0.25, 0.0, 3.0], ENTROPY, 0.0, [False, True, True, True]) == [2]
    assert pick([0.0, 0.0, 0.0], ENTROPY, 0.0) == [0, 1, 2]
    # Long enough that a sort which may exchange equals does.
    assert pick([0.5, 0.25] * 64, ENTROPY, 10.0) == list(range(1, 80, 2))
    assert pick([0.25] * 128, EXCLUSIVE_MAX, 10.0) == list(range(41))


def test_one_step_and_nothing_masked() -> None:
    nan = float("nan")
    assert pick([nan, nan, nan], ONE_STEP, nan, [True, False, True]) == [0, 2]
    for rule in range(4):
        assert pick([0.9, 0.9], rule, 0.5, [False, False]) == []
        assert pick([0.9, 0.9], rule, INF, [False, False]) == []


def random_blocks(rng: np.random.Generator, requests: int, size: int) -> tuple[Tensor, Tensor, Tensor, list[Row]]:
    """Logits, masked, ids and rows; padded and unmasked positions hold poison."""
    logits = torch.empty(requests, size, 260)
    masked = torch.as_tensor(rng.random((requests, size)) < rng.random())
    rows = []
    for r in range(requests):
        masked[r, rng.integers(1, size + 1) :] = False
        repeated = random_logits(rng, "normal")
        for b in range(size):
            # Peaked rows to pass the bounds, equal rows for ties.
            kind = str(rng.choice(["normal", "peaked", "alone", "ties", "extreme", "sparse", "constant"]))
            row_logits = repeated if rng.random() < 0.3 else random_logits(rng, kind)
            logits[r, b] = torch.as_tensor(row_logits)
            rows.append(random_row(rng))
            # No row that could be selected from becomes a bad one.
            rows[-1].bias = [0.0] * 260
            rows[-1].allowed = (np.array(rows[-1].allowed) | (row_logits == row_logits[4:].max())).tolist()
    logits[~masked] = float("nan")
    return logits, masked, torch.full((requests, size), POISON), rows


def check(
    result: Unmasked, logits: Tensor, masked: Tensor, ids: Tensor, rows: list[Row], control: list[Tensor]
) -> None:
    size = masked.shape[1]
    rule, bound, last_step = (values.tolist() for values in control)
    chosen = select(logits.view(-1, 260), pack(rows), need_statistics=True)
    assert chosen.confidence is not None and chosen.entropy is not None
    for r in range(masked.shape[0]):
        block = slice(r * size, (r + 1) * size)
        confidence, entropy = chosen.confidence[block].tolist(), chosen.entropy[block].tolist()
        places = oracle.pick(confidence, entropy, masked[r].tolist(), rule[r], bound[r], last_step[r])
        assert result.count[r] == len(places)
        assert bool(result.done[r]) == (len(places) == int(masked[r].sum()))
        assert len(places) > 0 or not masked[r].any()
        for b in range(size):
            assert bool(result.masked[r, b]) == (bool(masked[r, b]) and b not in places)
            if b in places:
                assert result.ids[r, b] == chosen.ids[r * size + b]
                assert result.logprobs[r, b] == chosen.logprobs[r * size + b]
            else:
                assert result.ids[r, b] == ids[r, b]
                assert result.logprobs[r, b].isnan()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 2, 4, 8, 16]))
def test_random_blocks_equal_the_oracle(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 7))
    logits, masked, ids, rows = random_blocks(rng, requests, size)
    rule = torch.as_tensor(rng.integers(0, 4, requests))
    bounds = np.where(rule.numpy() == 0, rng.choice([0.0, 0.3, 0.5, 0.7, 1.0]), rng.choice([0.0, 0.8, 1.5, 4.0, 100.0]))
    control = [rule, torch.as_tensor(bounds.astype(np.float32)), torch.as_tensor(rng.random(requests) < 0.2)]
    before = [tensor.clone() for tensor in (logits, masked, ids)]
    result = unmask(logits, masked, ids, pack(rows), *control)
    for tensor, copy in zip((logits, masked, ids), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
    assert not result.bad.any()
    check(result, logits, masked, ids, rows, control)


def test_a_request_is_alone_in_any_batch() -> None:
    rng = np.random.default_rng(12)
    logits, masked, ids, rows = random_blocks(rng, 12, 8)
    rule = torch.arange(12) % 4
    bound = torch.where(rule == 0, 0.3, 2.0)
    last_step = torch.arange(12) == 9
    together = unmask(logits, masked, ids, pack(rows), rule, bound, last_step)
    for r in range(12):
        s = slice(r, r + 1)
        alone = unmask(logits[s], masked[s], ids[s], pack(rows[8 * r : 8 * r + 8]), rule[s], bound[s], last_step[s])
        for name, values in vars(alone).items():
            expected = getattr(together, name)[s]
            assert torch.equal(values.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0)), name


def test_everything_is_only_a_shortcut() -> None:
    rng = np.random.default_rng(13)
    logits, masked, ids, rows = random_blocks(rng, 6, 8)
    rule = torch.tensor([3, 3, 0, 1, 2, 3])
    control = (rule, torch.zeros(6), rule != 3)
    long = unmask(logits, masked, ids, pack(rows), *control)
    short = unmask(logits, masked, ids, pack(rows), *control, everything=True)
    assert long.done.all() and torch.equal(long.count, masked.sum(1))
    for name, values in vars(long).items():
        assert torch.equal(values.nan_to_num(nan=1.0), getattr(short, name).nan_to_num(nan=1.0)), name


def test_steps_end() -> None:
    rng = np.random.default_rng(14)
    for rule in range(4):
        logits, masked, ids, rows = random_blocks(rng, 4, 8)
        logits = torch.as_tensor(np.stack([random_logits(rng, "normal") for _ in range(32)])).view(4, 8, 260)
        steps = 0
        while masked.any():
            control = (torch.full((4,), rule), torch.full((4,), 0.5), torch.zeros(4, dtype=torch.bool))
            result = unmask(logits, masked, ids, pack(rows), *control)
            assert torch.equal(result.done, ~result.masked.any(1))
            masked, ids = result.masked, result.ids
            steps += 1
        assert steps <= (1 if rule == ONE_STEP else 8)


@pytest.mark.parametrize("kind", LOGITS[-3:])
@pytest.mark.parametrize("rule", range(4))
def test_bad_rows_are_reported_where_masked_and_never_stall(kind: str, rule: int) -> None:
    rng = np.random.default_rng(15)
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for _ in range(9)])).view(3, 3, 260)
    logits[2, 1:] = 0.0
    masked = torch.tensor([[False, True, True], [False, False, False], [False, True, True]])
    rows = [Row() for _ in range(9)]
    control = (torch.full((3,), rule), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.bool))
    result = unmask(logits, masked, torch.full((3, 3), POISON), pack(rows), *control)
    assert result.bad.tolist() == [True, False, False]
    assert result.count[0] >= 1 and result.count[1] == 0 and result.count[2] >= 1
    assert result.done.tolist()[1] is True
    assert (result.ids[0, 1:][~result.masked[0, 1:]] == 2).all()
