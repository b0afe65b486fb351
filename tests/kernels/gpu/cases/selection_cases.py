"""Selection in Triton against the oracle and the torch path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastblt.kernels.gpu.selection import _keys, _truncate, gumbel_row
from fastblt.kernels.noise import gumbel
from fastblt.kernels.selection import _truncated, select, select_torch
from tests.kernels.poison import written
from tests.kernels.rows import LOGITS, bits, pack, random_logits, random_row
from tests.kernels.test_selection import (  # noqa: F401
    DISTINCT,
    flat,
    test_greedy_takes_the_lowest_of_equals,
    test_greedy_tells_scores_apart_that_log_softmax_rounds_to_one,
    test_nan_and_positive_infinity_make_a_row_bad,
    test_no_rows,
    test_only_allowed_ids_are_produced,
    test_penalties,
    test_rows_without_a_possible_id_are_bad,
    test_statistics_are_those_of_the_model_at_every_temperature,
    test_statistics_come_before_truncation_and_ignore_what_is_forbidden,
    test_statistics_of_a_certain_row,
    test_statistics_only_when_asked_for,
)
from tests.oracles import selection_oracle as oracle
from tests.oracles.selection_oracle import Row


@triton.jit
def _noise_kernel(seeds, positions, out):
    row = tl.program_id(0)
    lanes = tl.arange(0, 512)
    noise = gumbel_row(tl.load(seeds + row), tl.load(positions + row), lanes)
    tl.store(out + row * 260 + lanes, noise, mask=lanes < 260)


def test_noise_is_the_torch_path_s_bit_for_bit() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1 << 32, 12345678901])
    positions = torch.tensor([0, 1, 1000, 2**31, 2**32 - 1, 2**40 + 3])
    out = torch.empty(6, 260)
    _noise_kernel[(6,)](seeds, positions, out)
    assert torch.equal(out, gumbel(seeds, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_rows(dtype: torch.dtype) -> None:
    rng = np.random.default_rng([0, dtype.itemsize, dtype == torch.float16])
    kinds = [*LOGITS, *rng.choice(LOGITS, 30)]
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds])).to(dtype)
    rows = [random_row(rng) for _ in kinds]
    result = select(logits, pack(rows), need_statistics=True)
    written(result)
    wide = logits.float()
    plain = select_torch(wide, pack(rows), need_statistics=True)
    assert result.confidence is not None and result.entropy is not None
    assert plain.confidence is not None and plain.entropy is not None
    assert torch.equal(result.bad, plain.bad)
    good = plain.bad == 0
    assert result.confidence[~good].isnan().all() and result.entropy[~good].isnan().all()
    torch.testing.assert_close(result.confidence[good], plain.confidence[good], rtol=1e-6, atol=0)
    torch.testing.assert_close(result.entropy[good], plain.entropy[good], rtol=1e-6, atol=2e-6)
    close = 0
    for index, row in enumerate(rows):
        expected = oracle.select(wide[index].tolist(), row)
        assert result.bad[index] == expected.bad
        if expected.margin <= DISTINCT:
            close += 1
            continue
        assert result.ids[index] == expected.id == plain.ids[index], (kinds[index], row)
        if not expected.bad:
            np.testing.assert_allclose(result.logprobs[index].item(), expected.logprob, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(result.logprobs[index], plain.logprobs[index], rtol=1e-6, atol=1e-6)
    assert close < 5


@triton.jit
def _truncate_kernel(scores, top_k, top_p, min_p, out):
    row = tl.program_id(0)
    lanes = tl.arange(0, 512)
    inside = lanes < 260
    values = tl.load(scores + row * 260 + lanes, mask=inside, other=float("-inf"))
    e = tl.exp(values - tl.max(values, 0))
    stays = _truncate(_keys(values, lanes), e, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row))
    tl.store(out + row * 260 + lanes, stays, mask=inside)


def test_what_truncation_keeps() -> None:
    """The kept ids themselves: a draw seldom falls on the one at the boundary."""
    rng = np.random.default_rng(3)
    kinds = rng.choice(["normal", "ties", "constant", "sparse", "alone"], 40)
    scores = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds]))
    rows = [random_row(rng) for _ in kinds]
    for index in (0, 1):
        # Four quarters: the bounds are met exactly.
        scores[index] = torch.tensor(flat(_9=0.0, _20=0.0, _30=0.0, _40=0.0))
        rows[index] = Row(top_p=(0.25, 0.75)[index])
    for index, k in enumerate((1, 2, 5, 40, 259, 260), 2):
        scores[index] = torch.as_tensor(random_logits(rng, "normal"))
        rows[index] = Row(top_k=k)
    params = pack(rows, (True, True, False))
    out = torch.empty(40, 260, dtype=torch.bool)
    _truncate_kernel[(40,)](scores, params.top_k, params.top_p, params.min_p, out)
    expected = _truncated(scores, params)
    possible = scores > float("-inf")
    assert torch.equal(out & possible, expected > float("-inf"))
    kept = (out & possible).sum(1)
    assert kept[:8].tolist() == [1, 3, 1, 2, 5, 40, 259, 260] and len(kept.unique()) > 8


def test_truncation_at_ties() -> None:
    """Exactly representable masses: what stands at the boundary is decided as the torch path decides it."""
    logits = torch.tensor(flat(_9=1.0, _20=1.0, _30=1.0, _40=1.0, _50=-3.0))
    options = [{"top_p": p} for p in (0.0, 0.2, 0.25, 0.26, 0.75, 1.0)] + [{"top_k": k} for k in (1, 4, 5, 259, 260)]
    options += [{"min_p": p} for p in (1.0, 0.02, 0.01)] + [{"top_k": 5, "top_p": 0.5, "min_p": 1.0}]
    rows = [Row(temperature=1.0, seed=11, position=p, **option) for option in options for p in range(4)]  # type: ignore[arg-type]
    params = pack(rows)
    many = logits.expand(len(rows), 260)
    assert torch.equal(
        select(many, params, need_statistics=False).ids, select_torch(many, params, need_statistics=False).ids
    )


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Alone, with only the work it needs, or among others, with all of it: the same bits; from wider rows too."""
    rng = np.random.default_rng(2)
    kinds = list(LOGITS)
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds]))
    rows = [random_row(rng) for _ in kinds]
    alone = [bits(select(logits[i : i + 1], pack([row]), need_statistics=True)) for i, row in enumerate(rows)]
    order = rng.permutation(len(rows))
    wide = torch.full((len(rows), 512), float("nan"))
    wide[:, 100:360] = logits[torch.as_tensor(order)]
    params = pack([rows[i] for i in order], (True, True, True))
    together = bits(select(wide[:, 100:360], params, need_statistics=True))
    assert torch.equal(together, torch.cat([alone[i] for i in order]))


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency", "counts", "prompt_seen", "bias"])
def test_any_penalty_may_be_left_out(name: str) -> None:
    rng = np.random.default_rng(5)
    logits = torch.as_tensor(np.stack([random_logits(rng, "ties") for _ in range(4)]))
    rows = [Row(repetition=1.3, presence=0.5, frequency=0.25, counts=rng.poisson(1, 260).tolist()) for _ in range(4)]
    for row in rows:
        row.prompt_seen, row.bias = (rng.random(260) < 0.3).tolist(), rng.normal(size=260).tolist()
    params = pack(rows)
    setattr(params, name, None)
    assert torch.equal(
        select(logits, params, need_statistics=False).ids, select_torch(logits, params, need_statistics=False).ids
    )


def test_towards_temperature_0_a_draw_is_the_argmax() -> None:
    logits = [flat(_9=shift + 30.0, _20=shift + 29.0, _30=shift - 40.0) for shift in (0.0, -100.0, 1e4)]
    rows = [
        Row(temperature=temperature, seed=11, position=position, top_k=top_k)
        for temperature in (1e-45, 1e-44, 1e-40, 1e-37, 1e-30, 1e-6, 1e-3)
        for position in range(2)
        for top_k in (0, 2)
        for _ in logits
    ]
    result = select(torch.tensor(logits).repeat(len(rows) // len(logits), 1), pack(rows), need_statistics=True)
    written(result)
    assert (result.ids == 9).all() and not result.bad.any()
    assert result.confidence is not None
    assert torch.allclose(result.confidence, torch.tensor(30.0 - 29.0).sigmoid())
