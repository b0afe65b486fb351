"""Selection against the scalar oracle, case by case, and the contract of row invariance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastblt.kernels.selection
from fastblt.kernels.selection import select, select_torch
from fastblt.kernels.types import NOT_FINITE, NOTHING_LEFT, Selection, SelectionParams
from tests.kernels.rows import LOGITS, bits, needs, pack, random_logits, random_row
from tests.oracles import selection_oracle as oracle
from tests.oracles.selection_oracle import Row

DISTINCT = 2e-5

pytestmark = pytest.mark.usefixtures("path")


def one(logits: np.ndarray | Tensor | list[float], row: Row) -> Selection:
    return select(torch.as_tensor(logits, dtype=torch.float32).view(1, 260), pack([row]), need_statistics=True)


def flat(**scores: float) -> list[float]:
    """Logits that are -inf but for the named ids, as in flat(_7=0.5)."""
    logits = [float("-inf")] * 260
    for name, score in scores.items():
        logits[int(name[1:])] = score
    return logits


# --- Against the oracle ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_batches_equal_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.choice(LOGITS, 8)
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds]))
    rows = [random_row(rng) for _ in kinds]
    before = logits.clone()
    result = select(logits, pack(rows), need_statistics=True)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    assert result.confidence is not None and result.entropy is not None
    for index, row in enumerate(rows):
        expected = oracle.select(logits[index].tolist(), row)
        assert result.bad[index] == expected.bad
        if expected.bad:
            assert result.ids[index] == 2
            assert result.confidence[index].isnan() and result.entropy[index].isnan()
            continue
        np.testing.assert_allclose(result.confidence[index].item(), expected.confidence, rtol=3e-5, atol=1e-30)
        np.testing.assert_allclose(result.entropy[index].item(), expected.entropy, rtol=1e-5, atol=1e-5)
        if expected.margin > DISTINCT:
            assert result.ids[index] == expected.id, (kinds[index], row)
            np.testing.assert_allclose(result.logprobs[index].item(), expected.logprob, rtol=1e-6, atol=1e-5)


def test_the_oracle_seldom_calls_a_row_too_close() -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(rng) for _ in range(300)]
    choices = [oracle.select(random_logits(rng, str(rng.choice(LOGITS[:2]))).tolist(), row) for row in rows]
    assert sum(choice.margin <= DISTINCT for choice in choices) < 15


# --- Written out ----------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equals() -> None:
    for ids in ((200, 77, 259), (4, 5), (2, 258), (255, 256, 257, 258, 259)):
        logits = torch.zeros(260)
        logits[list(ids)] = 1.5
        assert one(logits, Row()).ids.item() == min(ids)
    assert one(torch.zeros(260), Row()).ids.item() == 2
    assert one(torch.zeros(260), Row(forbid_eos=True)).ids.item() == 4


def test_greedy_tells_scores_apart_that_log_softmax_rounds_to_one() -> None:
    logits = torch.tensor(flat(_10=0.0, _20=1e-8, _30=-1.0)).view(1, 260)
    assert logits.log_softmax(-1)[0, 10] == logits.log_softmax(-1)[0, 20]
    for flags in ((False, False, False), (True, False, False), (True, True, True)):
        assert select(logits, pack([Row()], flags), need_statistics=False).ids.item() == 20


def test_forbidden_ids_are_never_produced() -> None:
    logits = np.zeros(260, dtype=np.float32)
    logits[[0, 1, 3]] = 1e9
    logits[2] = 100
    assert one(logits, Row()).ids.item() == 2
    assert one(logits, Row(forbid_eos=True)).ids.item() == 4
    for temperature in (0.1, 1.0, 1e6):
        rows = [Row(temperature=temperature, seed=5, position=p, forbid_eos=True) for p in range(2000)]
        ids = select(torch.as_tensor(logits).expand(2000, 260), pack(rows), need_statistics=False).ids
        assert ids.min() >= 4


def test_statistics_come_before_truncation_and_ignore_what_is_forbidden() -> None:
    logits = np.full(260, -np.inf, dtype=np.float32)
    logits[[0, 1, 3]] = 50.0
    logits[[10, 11, 12, 13]] = 1.0
    result = one(logits, Row(temperature=1.0, top_k=1, top_p=0.1, min_p=1.0))
    assert result.confidence is not None and result.entropy is not None
    assert result.confidence.item() == 0.25
    np.testing.assert_allclose(result.entropy.item(), np.log(4), rtol=1e-6)
    # The logprob is the raw model's, forbidden ids included.
    np.testing.assert_allclose(result.logprobs.item(), -49 - np.log(3), rtol=1e-6)


def test_statistics_are_those_of_the_model_at_every_temperature() -> None:
    logits = flat(_10=2.0, _20=0.0)
    for temperature in (0.0, 1e-40, 0.1, 0.5, 1.0, 2.0, 1e30):
        result = one(logits, Row(temperature=temperature, top_k=1))
        p = 1 / (1 + np.exp(-2))
        assert result.confidence is not None and result.entropy is not None
        np.testing.assert_allclose(result.confidence.item(), p, rtol=1e-6)
        np.testing.assert_allclose(result.entropy.item(), -p * np.log(p) - (1 - p) * np.log1p(-p), rtol=1e-5)


def test_statistics_of_a_certain_row() -> None:
    for row in (Row(), Row(temperature=0.7, seed=3)):
        result = one(flat(_77=-3.0), row)
        assert result.confidence is not None and result.entropy is not None
        assert (result.ids.item(), result.confidence.item(), result.entropy.item()) == (77, 1.0, 0.0)
        assert result.logprobs.item() == 0.0 and not result.bad.item()


def test_statistics_only_when_asked_for() -> None:
    result = select(torch.zeros(2, 260), pack([Row(), Row()]), need_statistics=False)
    assert result.confidence is None and result.entropy is None


def test_penalties() -> None:
    counts, seen = [0] * 260, [False] * 260
    counts[10], counts[11], seen[12] = 3, 1, True
    logits = flat(_10=4.0, _11=-2.0, _12=3.0, _13=1.0)
    row = Row(repetition=2.0, presence=0.25, frequency=0.5, counts=counts, prompt_seen=seen)
    # 10: 4 / 2 - 1.5 - 0.25 = 0.25; 11: -2 * 2 - 0.75 = -4.75; 12: 3 / 2; 13: 1.
    result = one(logits, row)
    scores = np.array([0.25, -4.75, 1.5, 1.0])
    assert result.ids.item() == 12 and result.confidence is not None
    np.testing.assert_allclose(result.confidence.item(), np.exp(1.5) / np.exp(scores).sum(), rtol=1e-6)
    row.bias = [0.0] * 260
    row.bias[12], row.bias[11] = -float("inf"), 10.0
    assert one(logits, row).ids.item() == 11


def test_only_allowed_ids_are_produced() -> None:
    """A mask comes after the bias, opens nothing that is forbidden otherwise, and a row left with nothing is bad."""
    logits = flat(_0=9.0, _1=9.0, _2=3.0, _3=9.0, _10=2.0, _11=1.0)

    def row(*allowed: int, **options: Any) -> Row:
        return Row(allowed=[id in allowed for id in range(260)], **options)

    cases = [
        (row(0, 1, 2, 3, 10, 11), 2),
        (row(0, 1, 2, 3, 10, 11, forbid_eos=True), 10),
        (row(0, 1, 3, 10, 11), 10),
        (row(11), 11),
        (row(10, 11, bias=[100.0] * 260), 10),
        (row(11, temperature=1.0, top_k=1, seed=4), 11),
        (row(0, 1, 3), None),
        (row(2, forbid_eos=True), None),
        (row(77), None),
        (row(temperature=1.0), None),
        (Row(), 2),
    ]
    many = torch.tensor(logits).expand(len(cases), 260)
    result = select(many, pack([row for row, _ in cases]), need_statistics=True)
    assert result.bad.tolist() == [NOTHING_LEFT * (id is None) for _, id in cases]
    assert result.ids.tolist() == [2 if id is None else id for _, id in cases]
    assert result.confidence is not None
    # The statistics are those of what is allowed; the logprob is the raw model's.
    assert result.confidence[3].item() == 1.0
    np.testing.assert_allclose(result.logprobs[3].item(), many[0].log_softmax(-1)[11].item(), rtol=1e-6)


def test_allowing_everything_changes_no_bit() -> None:
    logits, rows = pool()
    rows = [Row(**{**vars(row), "allowed": [True] * 260}) for row in rows]
    params = pack(rows)
    expected = bits(select(logits, params, need_statistics=True))
    params.allowed = torch.ones(len(rows), 260, dtype=torch.bool)
    assert torch.equal(bits(select(logits, params, need_statistics=True)), expected)


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency", "counts", "prompt_seen", "bias"])
def test_any_penalty_may_be_left_out(name: str) -> None:
    rng = np.random.default_rng(5)
    off = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    logits = torch.as_tensor(np.stack([random_logits(rng, "ties") for _ in range(16)]))
    rows = [
        Row(
            repetition=1.3,
            presence=0.5,
            frequency=0.25,
            counts=rng.poisson(1, 260).tolist(),
            prompt_seen=(rng.random(260) < 0.3).tolist(),
            bias=rng.normal(size=260).tolist(),
        )
        for _ in range(16)
    ]
    params = pack(rows)
    setattr(params, name, None)
    left_out = select(logits, params, need_statistics=True)
    for row in rows:
        setattr(row, name, off.get(name, [0] * 260))
    assert torch.equal(bits(left_out), bits(select(logits, pack(rows, (False, False, True)), need_statistics=True)))


def drawn(logits: list[float], row: Row, draws: int = 400) -> set[int]:
    rows = [Row(**{**vars(row), "seed": 11, "position": position}) for position in range(draws)]
    return set(select(torch.tensor(logits).expand(draws, 260), pack(rows), need_statistics=False).ids.tolist())


def test_top_k_keeps_ties_at_the_boundary() -> None:
    logits = flat(_9=1.0, _20=0.5, _30=0.5, _40=0.5, _50=0.25)
    assert drawn(logits, Row(temperature=1.0, top_k=1)) == {9}
    assert drawn(logits, Row(temperature=1.0, top_k=2)) == {9, 20, 30, 40}
    assert drawn(logits, Row(temperature=1.0, top_k=4)) == {9, 20, 30, 40}
    assert drawn(logits, Row(temperature=1.0, top_k=5)) == {9, 20, 30, 40, 50}
    assert drawn(logits, Row(temperature=1.0, top_k=1000)) == {9, 20, 30, 40, 50}


def test_top_p_keeps_the_lowest_ids_of_ties_and_stops_when_reached() -> None:
    logits = flat(_9=1.0, _20=1.0, _30=1.0, _40=1.0)
    assert drawn(logits, Row(temperature=1.0, top_p=0.0)) == {9}
    assert drawn(logits, Row(temperature=1.0, top_p=0.2)) == {9}
    assert drawn(logits, Row(temperature=1.0, top_p=0.25)) == {9}
    assert drawn(logits, Row(temperature=1.0, top_p=0.26)) == {9, 20}
    assert drawn(logits, Row(temperature=1.0, top_p=0.75)) == {9, 20, 30}
    assert drawn(logits, Row(temperature=1.0, top_p=1.0)) == {9, 20, 30, 40}


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_top_p_of_one_keeps_what_lies_beyond_a_rounded_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three thirds in fp32 sum to more than 1, before the improbable id.
    logits = torch.tensor(flat(_9=0.0, _20=0.0, _30=0.0, _40=-30.0)).view(1, 260)
    assert logits.softmax(-1).sum(dtype=torch.float64) > 1
    noise = torch.zeros(1, 260)
    noise[0, 40] = 50.0
    monkeypatch.setattr(fastblt.kernels.selection, "gumbel", lambda seeds, positions: noise)
    params = pack([Row(temperature=1.0)], (True, True, False))
    assert select_torch(logits, params, need_statistics=False).ids.item() == 40


def test_top_p_is_renormalized_after_top_k() -> None:
    logits = flat(_9=2.0, _20=1.0, _30=0.0, _40=-1.0)
    # Of all four, 9 has 0.64; of the first two it has 0.73.
    assert drawn(logits, Row(temperature=1.0, top_p=0.7)) == {9, 20}
    assert drawn(logits, Row(temperature=1.0, top_p=0.7, top_k=2)) == {9}


def test_min_p_is_relative_to_the_most_probable() -> None:
    logits = flat(_9=2.0, _20=2.0, _30=1.0, _40=-1.0)
    assert drawn(logits, Row(temperature=1.0, min_p=1.0)) == {9, 20}
    assert drawn(logits, Row(temperature=1.0, min_p=0.37)) == {9, 20}
    assert drawn(logits, Row(temperature=1.0, min_p=0.36)) == {9, 20, 30}
    assert drawn(logits, Row(temperature=1.0, min_p=0.01)) == {9, 20, 30, 40}


@pytest.mark.parametrize("place", [0, 2, 3, 4, 259])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_positive_infinity_make_a_row_bad(place: int, temperature: float) -> None:
    for value in (float("nan"), float("inf")):
        logits = torch.zeros(2, 260)
        logits[0, place] = value
        rows = [Row(temperature=temperature, top_k=3, forbid_eos=True)] * 2
        result = select(logits, pack(rows), need_statistics=True)
        assert result.bad.tolist() == [NOT_FINITE, 0]
        assert result.ids[0] == 2 and result.ids[1] >= 4


def test_rows_without_a_possible_id_are_bad() -> None:
    only_eos = flat(_0=5.0, _1=5.0, _2=1.0, _3=9.0)
    assert one(only_eos, Row()).bad.tolist() == [0]
    assert one(only_eos, Row(forbid_eos=True)).bad.tolist() == [NOTHING_LEFT]
    assert one(only_eos, Row(forbid_eos=True, temperature=1.0)).bad.tolist() == [NOTHING_LEFT]
    assert one([0.0] * 260, Row(bias=[-float("inf")] * 260)).bad.tolist() == [NOTHING_LEFT]
    assert one(flat(), Row()).bad.tolist() == [NOT_FINITE]


def test_what_parameters_do_to_sound_logits_is_not_the_model_s() -> None:
    """Penalties that leave fp32, whatever the mask: told apart from logits that are NaN or infinite."""
    seen = [True] * 260
    only = [i == 77 for i in range(260)]
    for row in (Row(repetition=1e-45, prompt_seen=seen), Row(repetition=1e-45, prompt_seen=seen, temperature=1.0)):
        for allowed in ([True] * 260, only):
            row.allowed = allowed
            assert one([5.0] * 260, row).bad.tolist() == [NOTHING_LEFT]
            assert one([float("nan")] * 260, row).bad.tolist() == [NOT_FINITE]
            assert one([float("-inf")] * 260, row).bad.tolist() == [NOT_FINITE]


def test_temperatures_at_the_ends_of_fp32() -> None:
    """Towards 0 a draw is the argmax, on either side of fp32 and of 0; equals are drawn evenly."""
    for shift in (0.0, -100.0, 1e4):
        logits = flat(_9=shift + 30.0, _20=shift + 29.0, _30=shift - 40.0)
        for temperature in (1e-45, 1e-44, 1e-40, 1e-38, 1e-37, 1e-36, 1e-30, 1e-6, 1e-3):
            for row in (Row(temperature=temperature), Row(temperature=temperature, top_k=2, top_p=0.9, min_p=0.1)):
                assert drawn(logits, row) == {9}
        assert drawn(logits, Row(temperature=1e30)) == {9, 20, 30}
    for value in (0.0, 30.0, -30.0):
        assert drawn(flat(_9=value, _20=value, _30=value - 1), Row(temperature=1e-40)) == {9, 20}
    assert drawn(flat(_9=3e38, _20=1e38, _30=-3e38), Row(temperature=1e-40)) == {9}


def test_no_rows() -> None:
    empty = torch.empty(0)
    params = SelectionParams(
        empty, empty.long(), empty, empty, empty.long(), empty.long(), empty.bool(), sampled=True, truncated=True,
        penalized=False,
    )  # fmt: skip
    result = select(torch.empty(0, 260), params, need_statistics=True)
    assert result.ids.shape == (0,) and result.entropy is not None and result.entropy.shape == (0,)


def test_logits_may_be_a_view_of_wider_rows() -> None:
    rng = np.random.default_rng(4)
    logits = torch.as_tensor(np.stack([random_logits(rng, "normal") for _ in range(20)]))
    wide = torch.full((20, 512), float("nan"))
    wide[:, 100:360] = logits
    rows = [random_row(rng) for _ in range(20)]
    expected = select(logits, pack(rows), need_statistics=True)
    assert torch.equal(bits(select(wide[:, 100:360], pack(rows), need_statistics=True)), bits(expected))


# --- Row invariance -------------------------------------------------------------------------------------------------


def pool() -> tuple[Tensor, list[Row]]:
    rng = np.random.default_rng(2)
    kinds = [kind for kind in LOGITS for _ in range(2 if kind in LOGITS[-3:] else 12)]
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds]))
    # A few rows that need no work at all.
    return logits, [Row() if index % 30 == 0 else random_row(rng) for index in range(len(kinds))]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_bit_identical_in_any_batch(threads: int) -> None:
    """Alone with only the work it needs, or at any place among any rows with any work: the same bits."""
    torch.set_num_threads(threads)
    logits, rows = pool()
    alone = torch.cat(
        [bits(select(logits[i : i + 1], pack([row]), need_statistics=True)) for i, row in enumerate(rows)]
    )
    assert sum(not any(needs(row)) for row in rows) > 1
    rng = np.random.default_rng(threads)
    for size in [*range(1, 41), 127, 128, 260, 700]:
        members = rng.integers(0, len(rows), size)
        flags = (bool(rng.random() < 0.5), bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        params = pack([rows[member] for member in members], flags)
        together = bits(select(logits[torch.as_tensor(members)], params, need_statistics=True))
        assert torch.equal(together, alone[torch.as_tensor(members)]), size


def test_statistics_change_nothing_else() -> None:
    logits, rows = pool()
    params = pack(rows)
    with_them = select(logits, params, need_statistics=True)
    without = select(logits, params, need_statistics=False)
    assert torch.equal(with_them.ids, without.ids) and torch.equal(with_them.bad, without.bad)
    assert torch.equal(with_them.logprobs.view(torch.int32), without.logprobs.view(torch.int32))
