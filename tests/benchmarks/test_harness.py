from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from fastblt.benchmarks.harness import (
    begin,
    best_of,
    complete,
    end,
    endless,
    in_turns,
    over_best,
    ratio,
    replaced,
    start,
    stretch,
    whole_length,
)
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.server.request import FinishReason, SamplingParams

BLT = decoding("blt")


def test_requests_run_until_they_are_ended(model: Blt, prompts: list[list[int]]) -> None:
    engine = start(model, 3)
    names = begin(engine, prompts[:3], endless(BLT, 3))
    assert len(set(names)) == 3 and engine.stats().bytes_generated >= 3
    before = engine.stats().bytes_generated
    assert stretch(engine, count=30) > 0
    assert engine.stats().bytes_generated >= before + 30
    assert stretch(engine, seconds=0.01) > 0
    end(engine, names)
    assert not engine.has_work()
    # The engine outlives its requests.
    end(engine, begin(engine, prompts[:1], endless(BLT, 1)))


def test_outputs_come_in_the_order_of_the_prompts(model: Blt, prompts: list[list[int]]) -> None:
    params = [whole_length(BLT, 4 + 5 * at) for at in range(len(prompts))]
    seen: list[int] = []
    engine = start(model, 2)
    outputs = complete(
        engine, prompts, params, after_step=lambda outputs: seen.append(sum(len(one.ids) for one in outputs))
    )
    assert [len(output.ids) for output in outputs] == [4 + 5 * at for at in range(len(prompts))]
    assert all(output.finish_reason is FinishReason.LENGTH and output.ledger.decoder for output in outputs)
    assert seen == sorted(seen) and seen[-1] == sum(len(output.ids) for output in outputs)
    alone = [complete(start(model, 1), [ids], [one])[0].ids for ids, one in zip(prompts, params, strict=True)]
    assert [output.ids for output in outputs] == alone


def test_an_error_ends_a_run_unless_it_is_wanted(model: Blt, prompts: list[list[int]]) -> None:
    def broken(_: Any) -> Any:
        def step(*_: Any) -> None:
            raise RuntimeError("no luck")

        return step

    params = [SamplingParams(max_tokens=4, decoding=BLT)] * 2
    engine = start(model, 2)
    with replaced((engine._runner, "decode", broken)):
        outputs = complete(engine, prompts[:2], params, errors=True)
        assert {output.finish_reason for output in outputs} == {FinishReason.ERROR} and all(
            one.error for one in outputs
        )
        with pytest.raises(RuntimeError):
            complete(engine, prompts[:2], params)


def test_turns_and_ratios() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turns(2, {name: partial(measure, name) for name in "ab"}, warm_up=1)
    assert order == ["a", "b"] * 3 and found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert ratio([2.0, 9.0, 5.0], [1.0, 3.0, 1.0]) == 3.0


def test_the_best_is_not_the_luckiest() -> None:
    theirs = {"steady": [1.0, 1.0, 1.0], "lucky": [9.0, 0.5, 0.5]}
    assert best_of([1.0] * 3, theirs) == "steady" and over_best([1.0] * 3, theirs) == 1.0
    # Of ten equal ones that each had luck once, the best of all turns has more of it than the best of the others.
    turns = 10
    equal = {str(one): [2.0 if turn == one else 1.0 for turn in range(turns)] for one in range(turns)}
    assert over_best([1.0] * turns, equal) == 1.0
    assert over_best([3.0], {"a": [2.0], "b": [1.0]}) == 1.5


class _Place:
    def call(self, value: int) -> int:
        return value


def test_nothing_stays_replaced() -> None:
    def twice(call: Any) -> Any:
        return lambda *given: 2 * call(*given)

    place, before = _Place(), _Place.call
    with pytest.raises(KeyError), replaced((_Place, "call", twice)):
        assert _Place().call(3) == 6
        raise KeyError
    assert _Place.call is before
    with replaced((place, "call", twice)):
        assert place.call(3) == 6 and _Place().call(3) == 3
    assert vars(place) == {}
