from fastblt.benchmarks.text_statistics import distinct4, equal_positions, leading_equal, loops


def test_a_tail_with_a_short_period_is_a_loop() -> None:
    start = list(range(100))
    assert loops(start + [7] * 64)
    assert loops(start + list(range(32)) * 2)
    assert loops(start + [1, 2, 3] * 30)


def test_what_is_no_loop() -> None:
    assert not loops(list(range(100)))
    assert not loops(list(range(33)) * 3), "the period is too long"
    assert not loops([7] * 64 + [8]), "the loop has ended"
    assert not loops([7] * 63), "too short to tell"


def test_distinct_runs_of_four() -> None:
    assert distinct4(list(range(10))) == 1.0
    assert distinct4([1] * 11) == 1 / 8
    assert distinct4([1, 2, 3]) == 1.0


def test_equality() -> None:
    assert leading_equal([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert leading_equal([1, 2], [1, 2, 3]) == 2
    assert equal_positions([1, 2, 3, 4], [1, 2, 9, 4]) == 3
