"""Which positions of a block the C code fixes, against the scalar oracle. Whole steps are tested in the engine, by
tests/server/engine/test_decoder_steps.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.kernels.cpu.native import library
from fastblt.kernels.unmasking import CONFIDENCE, ENTROPY, EXCLUSIVE_MAX
from tests.oracles import selection_oracle as oracle

# Asked of another file: code that a compiler refuses must fail here, not skip.
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

NAN = float("nan")


def pick(rule: int, bound: float, confidences: list[float], entropies: list[float]) -> list[int]:
    native = library()
    assert native is not None
    first, second = np.array(confidences, dtype=np.float32), np.array(entropies, dtype=np.float32)
    picked = np.full(len(first), 7, dtype=np.uint8)
    native.fastblt_pick(rule, bound, first.ctypes.data, second.ctypes.data, len(first), picked.ctypes.data)
    return picked.nonzero()[0].tolist()


#: Few values, so that many are equal.
QUARTERS = st.integers(0, 8).map(lambda quarters: quarters / 4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from((CONFIDENCE, ENTROPY, EXCLUSIVE_MAX)),
    st.one_of(QUARTERS, st.floats(0.0, 20.0, width=32)),
    st.lists(st.one_of(QUARTERS, st.floats(0.0, 6.0, width=32)), min_size=1, max_size=33),
)
def test_equal_to_the_oracle(rule: int, bound: float, values: list[float]) -> None:
    # The other statistic is poison: no rule may read it.
    poison = [NAN] * len(values)
    given_ = (values, poison) if rule == CONFIDENCE else (poison, values)
    assert pick(rule, bound, *given_) == oracle.pick(*given_, [True] * len(values), rule, bound, False)


@pytest.mark.parametrize("rule", (CONFIDENCE, ENTROPY, EXCLUSIVE_MAX))
def test_a_bad_row_is_fixed_last(rule: int) -> None:
    assert pick(rule, 0.5, [NAN, 0.3, NAN], [NAN, 0.9, NAN]) == [1]
    assert pick(rule, 0.5, [NAN, NAN], [NAN, NAN]) == [0]
