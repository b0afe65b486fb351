"""The reference's own selection: published vectors, cases worked by hand, and the distribution that it draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fastblt.models.reference import unmask
from fastblt.models.reference_options import DecodingOptions
from fastblt.models.reference_selection import (
    SamplingOptions,
    Selected,
    forbidden,
    gumbel,
    gumbel_row,
    mixed_seed,
    penalized,
    philox4x32,
    select,
    truncated,
)


def row(values: dict[int, float], rest: float = -50.0) -> np.ndarray:
    out = np.full(260, rest, dtype=np.float32)
    for i, value in values.items():
        out[i] = value
    return out


def kept(values: dict[int, float], **options: Any) -> set[int]:
    return set(np.flatnonzero(truncated(row(values, -np.inf), SamplingOptions(**options)) > -np.inf).tolist())


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: Any, key: Any, words: Any) -> None:
    assert philox4x32(counter, key) == words


def test_mixed_seeds_are_the_splitmix64_sequence() -> None:
    assert [mixed_seed(1234567, choice) for choice in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    assert mixed_seed(-1, 0) == mixed_seed(2**64 - 1, 0)


def test_noise_of_a_row_is_that_of_its_ids() -> None:
    noise = gumbel_row(5, 1, 2**32 + 3)
    assert noise.dtype == np.float32 and noise.shape == (260,)
    assert [gumbel(5, 1, 2**32 + 3, i) for i in range(260)] == noise.tolist()
    assert not np.array_equal(noise, gumbel_row(5, 1, 3)) and not np.array_equal(noise, gumbel_row(5, 0, 2**32 + 3))


def test_noise_is_gumbel() -> None:
    values = np.sort(np.concatenate([gumbel_row(0, 0, position) for position in range(40)]))
    expected = np.exp(-np.exp(-values.astype(np.float64)))
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by all but one seed in a thousand.
    assert np.abs(expected - np.arange(len(values)) / len(values)).max() < 1.95 / math.sqrt(len(values))


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert select(row({9: 3.0, 7: 3.0, 200: 3.0}), SamplingOptions(), [], [], 5, 0).id == 7
    # Truncation and noise have no say.
    options = SamplingOptions(top_k=1, seed=3, min_p=1.0)
    assert select(row({9: 3.0, 7: 3.0}), options, [], [], 5, 0).id == 7


def test_ids_that_are_never_produced() -> None:
    high = row({0: 9.0, 1: 9.0, 3: 9.0, 2: 8.0, 50: 1.0})
    assert select(high, SamplingOptions(), [], [], 1, 0).id == 2
    assert select(high, SamplingOptions(ignore_eos=True), [], [], 1, 0).id == 50
    assert select(high, SamplingOptions(min_tokens=4), [], [], 1, 3).id == 50
    assert select(high, SamplingOptions(min_tokens=4), [], [], 1, 4).id == 2
    assert forbidden(SamplingOptions(), 0) == {0, 1, 3}


def test_penalties() -> None:
    logits = row({10: 4.0, 11: -4.0, 12: 4.0, 13: 4.0}, 0.0)
    options = SamplingOptions(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={13: -1.5, 14: 2.0}
    )
    scores = penalized(logits, options, prompt=[10, 11], output=[12, 12, 12])
    # Repetition over prompt and output, the others over the output only, the bias after all.
    assert scores[10:16].tolist() == [2.0, -8.0, 2.0 - 1.75, 2.5, 2.0, 0.0]
    assert logits[10] == 4.0


def test_top_k_keeps_ties_at_its_boundary() -> None:
    values = {5: 3.0, 6: 2.0, 7: 2.0, 8: 1.0}
    assert kept(values, top_k=1) == {5}
    assert kept(values, top_k=2) == kept(values, top_k=3) == {5, 6, 7}
    assert kept(values, top_k=300) == kept(values) == {5, 6, 7, 8}


def test_top_p_keeps_the_smallest_prefix() -> None:
    values = {9: math.log(0.25), 4: math.log(0.5), 7: math.log(0.25)}
    assert kept(values, top_p=1e-9) == kept(values, top_p=0.49) == {4}
    assert kept(values, top_p=0.6) == {4, 7}
    assert kept(values, top_p=0.9) == {4, 7, 9}
    # Renormalized after top_k: of 0.4, 0.4 and 0.2 two are left with 0.5 each.
    assert kept({4: math.log(0.4), 5: math.log(0.4), 6: math.log(0.2)}, top_k=2, top_p=0.45) == {4}


def test_min_p_is_relative_to_the_best() -> None:
    values = {4: math.log(0.5), 5: math.log(0.3), 6: math.log(0.2)}
    assert kept(values, min_p=0.5) == {4, 5}
    assert kept(values, min_p=1.0) == {4}
    assert kept(values, min_p=0.1) == {4, 5, 6}


def test_certainty_is_before_truncation_and_temperature() -> None:
    logits = row({4: math.log(0.5), 5: math.log(0.25), 6: math.log(0.25)}, -np.inf)
    cold = select(logits, SamplingOptions(top_k=1), [], [], 1, 0)
    assert cold.confidence == pytest.approx(0.5) and cold.entropy == pytest.approx(1.5 * math.log(2))
    hot = select(logits, SamplingOptions(temperature=0.5, top_k=1), [], [], 1, 0)
    assert hot.confidence == pytest.approx(0.5) and hot.entropy == pytest.approx(1.5 * math.log(2)) and hot.id == 4
    assert hot.logprob == pytest.approx(math.log(0.5))


def test_draws_follow_the_distribution() -> None:
    shares = {10: 0.5, 20: 0.3, 30: 0.15, 40: 0.05}
    logits = row({i: 0.7 * math.log(share) for i, share in shares.items()})
    options = SamplingOptions(temperature=0.7, seed=11, min_p=0.01)
    draws = 1500
    counts = Counter(select(logits, options, [], [], position, 0).id for position in range(draws))
    squares = sum((counts[i] - draws * share) ** 2 / (draws * share) for i, share in shares.items())
    # Three degrees of freedom: 16.3 is passed by all but one seed in a thousand.
    assert set(counts) == set(shares) and squares < 16.3


def test_choices_differ_and_a_choice_repeats() -> None:
    logits = row({}, 0.0)

    def ids(**options: Any) -> list[int]:
        return [select(logits, SamplingOptions(temperature=1.0, **options), [], [], p, 0).id for p in range(8)]

    assert ids(seed=4) == ids(seed=4)
    assert ids(seed=4) != ids(seed=4, choice=1) != ids(seed=5)


def rows(confidences: list[float], entropies: list[float]) -> dict[int, Selected]:
    pairs = zip(confidences, entropies, strict=True)
    return {index: Selected(9, 0.0, c, h, 1.0) for index, (c, h) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"unmasking": "one_step"}, {0, 1, 2, 3}),
        ({"confidence_threshold": 0.5}, {1, 3}),
        ({"confidence_threshold": 0.7}, {1}),  # exceeds, not reaches: of two equals at the threshold the lowest
        ({"unmasking": "entropy", "entropy_bound": 1.0}, {1, 3}),
        ({"unmasking": "entropy", "entropy_bound": 0.9}, {1}),
        ({"unmasking": "entropy", "entropy_bound": 0.0}, {1}),
        ({"unmasking": "entropy", "entropy_bound": 1.0, "entropy_rule": "exclusive_max"}, {1, 3, 0}),
        ({"unmasking": "entropy", "entropy_bound": 0.0, "entropy_rule": "exclusive_max"}, {1}),
    ],
)
def test_unmasking(options: dict[str, Any], expected: set[int]) -> None:
    # Entropies .1, .9, 1.5 under a bound of 1 are two inclusively and three by the other.
    found = unmask(rows([0.4, 0.7, 0.2, 0.7], [1.5, 0.1, 2.0, 0.9]), DecodingOptions(**options))
    assert set(found) == expected


def test_the_last_step_fills_everything() -> None:
    found = rows([0.1, 0.2], [5.0, 4.0])
    assert unmask(found, DecodingOptions()) == [1]
    assert unmask(found, DecodingOptions(), last=True) == [0, 1]
    assert unmask({}, DecodingOptions()) == []


def test_equal_entropies_go_in_order() -> None:
    options = DecodingOptions(unmasking="entropy", entropy_bound=1.0)
    assert unmask(rows([0.1, 0.1, 0.1], [0.5, 0.5, 0.5]), options) == [0, 1]
