"""The patch rule: incremental equals whole, against the published statement of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastblt.models.patching import PatchRule, entropies
from tests.oracles.blt_oracle import patch_lengths

VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=40)
LONGEST = st.sampled_from([None, 1, 2, 3, 8])


@given(VALUES, LONGEST)
def test_starts_are_those_of_runs_cut_into_chunks(values: list[float], longest: int | None) -> None:
    lengths = patch_lengths(np.array(values), 1.0, longest)
    expected = [False] * (len(values) + 1)
    for start in itertools.accumulate([0, *lengths[:-1]]):
        expected[start] = True
    assert PatchRule(1.0, longest).starts(values) == expected


@given(VALUES, LONGEST, st.integers(0, 40))
def test_nothing_appended_changes_a_start(values: list[float], longest: int | None, cut: int) -> None:
    rule = PatchRule(1.0, longest)
    prefix = values[: cut % len(values) + 1]
    assert rule.starts(values)[: len(prefix) + 1] == rule.starts(prefix)


@given(VALUES, LONGEST)
def test_one_byte_at_a_time(values: list[float], longest: int | None) -> None:
    rule = PatchRule(1.0, longest)
    starts, run = [True], 1
    for position, value in enumerate(values):
        opens = rule.opens(position, value, run)
        starts.append(opens)
        run = 1 if opens else run + 1
    assert starts == rule.starts(values)


@given(VALUES, LONGEST)
def test_no_patch_is_longer_than_allowed(values: list[float], longest: int | None) -> None:
    starts = PatchRule(1.0, longest).starts(values)
    at = [position for position, opens in enumerate(starts) if opens]
    assert longest is None or all(b - a <= longest for a, b in itertools.pairwise([*at, len(starts)]))
    assert starts[:2] == [True, True]


def test_the_threshold_itself_opens_nothing() -> None:
    assert PatchRule(1.0).starts([9.0, 1.0, math.nextafter(1.0, 2.0)]) == [True, True, False, True]


def test_entropies_in_nats() -> None:
    logits = torch.zeros(3, 260)
    logits[1, 7] = 100.0
    logits[2, :2] = 60.0
    assert entropies(logits).tolist() == pytest.approx([math.log(260), 0.0, math.log(2)], abs=1e-5)


@given(VALUES, LONGEST, st.lists(st.integers(1, 40), max_size=5))
def test_ends_by_patches_are_those_by_bytes(values: list[float], longest: int | None, cuts: list[int]) -> None:
    """However a sequence is cut into chunks."""
    rule = PatchRule(1.0, longest)
    ends: list[int] = []
    position = 0
    for stop in sorted({min(cut, len(values)) for cut in cuts} | {len(values)}):
        if stop > position:
            ends += rule.ends(position, values[position:stop], ends[-1] + 1 if ends else 0)
            position = stop
    assert ends == [p for p, starts in enumerate(rule.starts(values)[1:]) if starts]
