"""Measures of repetition and of equality of decoded texts. Repetition inflates acceptance and patch sizes."""

from __future__ import annotations

from collections.abc import Sequence


def loops(ids: Sequence[int], tail: int = 64, longest: int = 32) -> bool:
    """Whether the last `tail` ids repeat with a period of at most `longest`. False for a text shorter than `tail`."""
    end = ids[-tail:]
    if len(end) < tail:
        return False
    return any(end[period:] == end[:-period] for period in range(1, longest + 1))


def distinct4(ids: Sequence[int]) -> float:
    """The number of different runs of four ids divided by the number of all runs; 1 for a text without such a run."""
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return len(set(runs)) / len(runs) if runs else 1.0


def leading_equal(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common prefix of two texts, in ids."""
    for at, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return at
    return min(len(ids), len(others))


def equal_positions(ids: Sequence[int], others: Sequence[int]) -> int:
    """At how many positions two texts have the same id."""
    return sum(one == other for one, other in zip(ids, others, strict=False))
