"""The dense part of a layer in C: against sums in double precision, and row by row against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastblt.kernels.cpu.dense import feed_forward, pack, pack_norm, project, project_add, rms_norm
from fastblt.kernels.cpu.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

ROWS = st.integers(1, 60)
SIZES = st.sampled_from([1, 8, 15, 16, 40, 129])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def wide(x: torch.Tensor) -> NDArray[np.float64]:
    return x.double().numpy()


def normed(x: NDArray[np.float64], gain: torch.Tensor, eps: float) -> NDArray[np.float64]:
    return wide(gain) * x / np.sqrt((x**2).mean(1, keepdims=True) + eps)


@settings(max_examples=25, deadline=None)
@given(ROWS, SIZES, st.lists(SIZES, min_size=1, max_size=3), st.booleans())
def test_project(rows: int, depth: int, outputs: list[int], with_norm: bool) -> None:
    x, gain = draw(1, rows, depth), draw(2, depth)
    weights = [draw(3 + i, size, depth) for i, size in enumerate(outputs)]
    given_rows = normed(wide(x), gain, 1e-5) if with_norm else wide(x)
    results = project(x, pack_norm(gain, 1e-5) if with_norm else None, tuple(pack(w) for w in weights))
    for result, weight in zip(results, weights, strict=True):
        np.testing.assert_allclose(wide(result), given_rows @ wide(weight).T, rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(ROWS, SIZES, SIZES, st.integers(0, 4))
def test_weights_that_bfloat16_holds_are_kept_in_half_the_memory_and_change_no_bit(
    rows: int, depth: int, outputs: int, seed: int
) -> None:
    x, weight = draw(seed, rows, depth), draw(seed + 9, outputs, depth).bfloat16().float()
    weight[0, 0] = -0.0
    # Beside a third, which no bfloat16 is, all of them stay as they are.
    third = torch.full((1, depth), 1 / 3)
    narrow, wider = pack(weight), pack(torch.cat((weight, third)))
    assert narrow.struct.narrow and not wider.struct.narrow
    panels = -(-outputs // 16)
    assert narrow.panels.nbytes == 2 * panels * 16 * depth
    ours, theirs = (project(x, None, (one,))[0][:, :outputs] for one in (narrow, wider))
    assert ours.numpy().tobytes() == theirs.numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(ROWS, SIZES, SIZES, st.integers(0, 2))
def test_project_add(rows: int, depth: int, outputs: int, times: int) -> None:
    x, weight, residual = draw(1, rows, depth), draw(2, outputs, depth), draw(3, rows, outputs)
    result = project_add(x, pack(weight), residual, times)
    np.testing.assert_allclose(wide(result), wide(x) @ wide(weight).T + times * wide(residual), rtol=1e-4, atol=1e-4)


def test_a_residual_is_added_up_to_twice() -> None:
    x, weight = draw(1, 2, 8), draw(2, 8, 8)
    with pytest.raises(ValueError, match="not 3 times"):
        project_add(x, pack(weight), x, 3)


@settings(max_examples=25, deadline=None)
@given(ROWS, SIZES, SIZES)
def test_feed_forward(rows: int, depth: int, inner: int) -> None:
    x, gain = 3 * draw(1, rows, depth), draw(2, depth)
    gate, up, down = draw(3, inner, depth), draw(4, inner, depth), draw(5, depth, inner)
    inside = normed(wide(x), gain, 1e-6)
    gates = inside @ wide(gate).T
    expected = wide(x) + (gates / (1 + np.exp(-gates)) * (inside @ wide(up).T)) @ wide(down).T
    result = feed_forward(x, pack_norm(gain, 1e-6), pack(gate), pack(up), pack(down))
    np.testing.assert_allclose(wide(result), expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(ROWS, SIZES)
def test_rms_norm(rows: int, size: int) -> None:
    x, gain = draw(1, rows, size), draw(2, size)
    np.testing.assert_allclose(
        wide(rms_norm(x, pack_norm(gain, 1e-5))), normed(wide(x), gain, 1e-5), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 120), st.sampled_from([16, 48, 136]), st.data())
def test_a_row_never_depends_on_its_batch(rows: int, depth: int, data: st.DataObject) -> None:
    """Bit by bit, for any choice of the rows in any order."""
    x, gain = draw(1, rows, depth), pack_norm(draw(2, depth), 1e-5)
    first, back = pack(draw(3, 100, depth)), pack(draw(4, depth, 100))
    some = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    for function in (
        lambda x: rms_norm(x, gain),
        lambda x: project(x, gain, (first,))[0],
        lambda x: project_add(project(x, None, (first,))[0], back, x, 2),
        lambda x: feed_forward(x, gain, first, first, back),
    ):
        assert torch.equal(function(x)[some], function(x[some]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(poison: float) -> None:
    x, gain = draw(1, 9, 32), pack_norm(draw(2, 32), 1e-5)
    weights = pack(draw(3, 32, 32))
    good = feed_forward(x, gain, weights, weights, weights)
    x[4, 7] = poison
    bad = feed_forward(x, gain, weights, weights, weights)
    assert not bad[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(bad[others], good[others])


def test_large_gates_stay_finite() -> None:
    """silu of 200 is 200, of -200 about 0."""
    one, norm = torch.eye(1), pack_norm(torch.tensor([200.0]), 0.0)
    for value, expected in ((1.0, 1.0 + 200.0 * 200.0), (-1.0, -1.0)):
        result = feed_forward(torch.tensor([[value]]), norm, pack(one), pack(one), pack(one))
        assert float(result) == pytest.approx(expected, rel=1e-6)


def test_weights_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="fp32 on a CPU"):
        pack(torch.zeros(2, 2, dtype=torch.bfloat16))
