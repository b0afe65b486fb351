"""Who gets the rows of a pass: shortest remainder first, a part for the oldest; and nothing is computed twice."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fastblt.server.decoding.blt import Blt
from fastblt.server.engine.pass_time import PromptBudget
from fastblt.server.engine.prompts import Leaders, divide
from fastblt.server.engine.sequence import Sequence
from fastblt.server.request import DecodingParams, Request, SamplingParams

PAGE = 16


def prompt(number: int, ids: list[int], *, decoded: int = 0, priority: int = 0, salt: str | None = None) -> Sequence:
    request = Request(f"r{number}", ids, SamplingParams(max_tokens=4), 0.0, priority=priority, cache_salt=salt)
    sequence = Sequence(request, DecodingParams(), Blt(), 0)
    sequence.number, sequence.decoded, sequence.state_index = number, decoded, number + 1
    return sequence


def text(seed: int, length: int) -> list[int]:
    return [1, *random.Random(seed).choices(range(4, 260), k=length - 1)]


def rows_of(prompts: list[Sequence], rows: int, leaders: Leaders | None = None) -> dict[int, int]:
    """Rows by number."""
    given_rows = divide(prompts, PromptBudget(rows), leaders, room=lambda _, wanted: wanted, join=lambda _: None)
    return {sequence.number: count for sequence, count in given_rows.items()}


def test_the_shortest_remainder_goes_first_and_the_oldest_has_its_part() -> None:
    old, middle, short = (prompt(number, text(number, size)) for number, size in ((1, 900), (2, 300), (3, 50)))
    assert rows_of([old, middle, short], 200) == {3: 50, 2: 100, 1: 50}
    # What is left over goes to whoever can use it.
    assert rows_of([middle, short], 1000) == {3: 50, 2: 300}
    assert rows_of([old, short], 200) == {3: 50, 1: 150}
    assert rows_of([old], 200) == {1: 200}


def test_priority_goes_before_length() -> None:
    important, short = prompt(2, text(0, 500), priority=-1), prompt(1, text(1, 50))
    assert rows_of([short, important], 100) == {2: 100}


def test_one_computes_what_several_need() -> None:
    same = [prompt(number, text(0, 200)) for number in range(1, 4)]
    leaders = Leaders(PAGE, 1)
    assert rows_of(same, 1000, leaders) == {1: 200}
    assert [one.follows for one in same] == [False, True, True]
    # It is done: the others go on behind it.
    same[0].decoded = 200
    assert rows_of(same[1:], 1000, Leaders(PAGE, 1)) == {2: 200}


def test_salts_part_what_is_shared() -> None:
    apart = [prompt(number, text(0, 200), salt=salt) for number, salt in ((1, None), (2, ""), (3, "a"))]
    assert rows_of(apart, 1000, Leaders(PAGE, 1)) == {1: 200, 2: 200, 3: 200}


def test_nobody_waits_for_pages_that_it_does_not_need() -> None:
    long = prompt(1, text(0, 100) + text(1, 900), decoded=120)
    other = prompt(2, text(0, 100) + text(2, 900))
    # The first is behind what both share.
    assert set(rows_of([long, other], 10_000, Leaders(PAGE, 1))) == {1, 2}
    long.decoded = 64
    assert set(rows_of([long, other], 10_000, Leaders(PAGE, 1))) == {1}


def test_a_wait_has_to_pay() -> None:
    """A pass more costs as much as 64 rows: nobody waits for less, but who has begun to waits for all."""
    one, other = prompt(1, text(0, 48) + text(1, 100)), prompt(2, text(0, 48) + text(2, 100))
    assert rows_of([one, other], 10_000, Leaders(PAGE, 64)) == {1: 148, 2: 148}
    assert rows_of([one, other], 10_000, Leaders(PAGE, 48)) == {1: 148}
    one.decoded = 32
    assert other.follows and rows_of([one, other], 10_000, Leaders(PAGE, 64)) == {1: 116}


def test_who_is_computed_elsewhere_in_the_beat_leads() -> None:
    held, other = prompt(1, text(0, 200)), prompt(2, text(0, 200))
    assert rows_of([other], 1000, Leaders(PAGE, 1, [held])) == {}
    assert rows_of([other], 1000, Leaders(PAGE, 1)) == {2: 200}


@given(st.integers(0, 2**32))
def test_no_page_is_computed_twice_and_the_oldest_never_stands_still(seed: int) -> None:
    rng = random.Random(seed)
    texts = [text(rng.randrange(3), rng.choice((40, 200, 600))) for _ in range(3)]
    prompts = []
    for number in rng.sample(range(50), rng.randint(1, 10)):
        ids = rng.choice(texts)[: rng.randint(20, 600)] + text(100 + number, rng.choice((1, 30, 300)))[1:]
        prompts.append(prompt(number, ids, decoded=rng.choice((0, 0, rng.randrange(len(ids)))), priority=0))
    rows = rng.choice((1, 8, 100, 1000))
    given_rows = rows_of(prompts, rows, Leaders(PAGE, 1))
    assert 0 < sum(given_rows.values()) <= rows
    pages: set[tuple[int, ...]] = set()
    for one in prompts:
        got = given_rows.get(one.number, 0)
        assert got <= one.known - one.decoded
        # Pages that are computed from their beginning.
        for at in range(-(-one.decoded // PAGE), (one.decoded + got) // PAGE):
            page = tuple(one.ids[: (at + 1) * PAGE])
            assert page not in pages
            pages.add(page)
    oldest = min(prompts, key=lambda one: one.number)
    if oldest.number not in given_rows:
        # Somebody does it for the oldest.
        assert oldest.follows
        at = oldest.decoded // PAGE
        assert any(
            other.number in given_rows and other.ids[: (at + 1) * PAGE] == oldest.ids[: (at + 1) * PAGE]
            for other in prompts
        )
    elif len(prompts) > 1 and rows >= 100 and not oldest.follows:
        assert given_rows[oldest.number] >= min(rows // 4, oldest.known - oldest.decoded)
