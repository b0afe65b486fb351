"""Functions for all measurements of the engine: start it, keep it busy, time it, patch it, compare.

    engines = {name: start(model, requests=8) for name in settings}
    for name, engine in engines.items():
        begin(engine, prompts, endless(decoding(name), 8))      # requests run until the measurement is over
    speeds = in_turns(5, {name: partial(stretch, engine, count=1000) for name, engine in engines.items()})
    print(ratio(speeds["auto"], speeds["blt"]))

To run requests to their ends: `complete(start(model, 8), prompts, params)`. A single time says little on a shared
machine, so measure alternatives in turns, and compare medians of the ratios within a turn. `replaced` patches functions
of the engine temporarily. `fastblt.benchmarks.command` turns measurements into commands.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastblt.models.blt import Blt
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingParams, Delta, FinishReason, Ledger, Request, SamplingParams
from fastblt.server.settings import EngineSettings

T = TypeVar("T")

_numbers = itertools.count()


def start(model: Blt, requests: int, **settings: Any) -> Engine:
    """An engine that runs up to `requests` requests at once. `settings` are fields of EngineSettings."""
    return Engine(model, EngineSettings(max_running=requests, **settings))


def whole_length(decoding: DecodingParams, length: int, temperature: float = 0.0, seed: int = 0) -> SamplingParams:
    """Parameters of a request for exactly `length` bytes."""
    return SamplingParams(max_tokens=length, temperature=temperature, seed=seed, ignore_eos=True, decoding=decoding)


def endless(decoding: DecodingParams, count: int, temperature: float = 0.0) -> list[SamplingParams]:
    """Parameters of `count` requests that are long enough to outlast a measurement, with seeds 0, 1, ..."""
    return [whole_length(decoding, 16_000, temperature, seed) for seed in range(count)]


def submit(engine: Engine, ids: list[int], params: SamplingParams) -> str:
    """Add a request. Returns its id."""
    name = f"r{next(_numbers)}"
    engine.add(Request(name, ids, params, time.monotonic()))
    return name


def begin(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[str]:
    """Submit requests, one before each step, and run until all have begun to decode. Returns their ids."""
    names: list[str] = []
    waiting: set[str] = set()
    for ids, one in zip(prompts, params, strict=True):
        names.append(submit(engine, ids, one))
        waiting.add(names[-1])
        waiting -= {delta.request_id for delta in engine.step()}
    while waiting:
        waiting -= {delta.request_id for delta in engine.step()}
    return names


def stretch(engine: Engine, count: float = math.inf, seconds: float = math.inf) -> float:
    """Run until `count` more bytes are generated or `seconds` have passed. Returns bytes per second."""
    begun, clock, made, passed = engine.stats().bytes_generated, time.perf_counter(), 0, 0.0
    while made < count and passed < seconds:
        engine.step()
        made, passed = engine.stats().bytes_generated - begun, time.perf_counter() - clock
    return made / passed


def end(engine: Engine, names: Sequence[str]) -> None:
    """Abort requests, and run until the engine has nothing to do."""
    for name in names:
        engine.abort(name)
    while engine.has_work():
        engine.step()


@dataclass
class Output:
    """The output of one request, how it ended, and its ledger."""

    ids: list[int] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    finish_reason: FinishReason | None = None
    error: object = None

    def take(self, delta: Delta) -> None:
        """Add a delta of the request."""
        self.ids += delta.ids
        self.ledger = delta.ledger or self.ledger
        if delta.finish_reason is not None:
            self.finish_reason, self.error = delta.finish_reason, delta.error


def complete(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    *,
    after_step: Callable[[list[Output]], None] | None = None,
    errors: bool = False,
) -> list[Output]:
    """Run requests to their ends, all submitted at once. `after_step` is called with their outputs so far.

    Raises RuntimeError if a request ends in an error, unless `errors` is true.
    """
    names = [submit(engine, ids, one) for ids, one in zip(prompts, params, strict=True)]
    outputs = {name: Output() for name in names}
    while engine.has_work():
        for delta in engine.step():
            outputs[delta.request_id].take(delta)
            if delta.finish_reason is FinishReason.ERROR and not errors:
                raise RuntimeError(delta.error)
        if after_step is not None:
            after_step(list(outputs.values()))
    return list(outputs.values())


def in_turns(rounds: int, measures: Mapping[str, Callable[[], T]], warm_up: int = 0) -> dict[str, list[T]]:
    """The results of each measure by round. In a round every measure runs once. `warm_up` rounds are not returned."""
    found: dict[str, list[T]] = {name: [] for name in measures}
    for turn in range(warm_up + rounds):
        for name, measure in measures.items():
            result = measure()
            if turn >= warm_up:
                found[name].append(result)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over turns of `ours` / `theirs` within a turn."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def best_of(ours: Sequence[float], theirs: Mapping[str, Sequence[float]]) -> str:
    """The name of the one of `theirs` that `ours` is the least above."""
    return min(theirs, key=lambda name: ratio(ours, theirs[name]))


def over_best(ours: Sequence[float], theirs: Mapping[str, Sequence[float]]) -> float:
    """The median over turns of `ours` over the best of `theirs`, each turn beside that which is the best in all others.

    The best of many in the very turns that are judged is in part the luckiest, and nobody could have chosen it before.
    """

    def without(turn: int, speeds: Sequence[float]) -> list[float]:
        return [*speeds[:turn], *speeds[turn + 1 :]] or list(speeds)

    bests = [
        best_of(without(turn, ours), {name: without(turn, own) for name, own in theirs.items()})
        for turn in range(len(ours))
    ]
    return ratio(ours, [theirs[name][turn] for turn, name in enumerate(bests)])


@contextmanager
def replaced(*changes: tuple[Any, str, Callable[[Any], Any]]) -> Iterator[None]:
    """Patch functions for a while. Each of `changes` is (class, module or object; name; change): the function is
    replaced by `change(function)`."""
    before = [(place, name, vars(place).get(name)) for place, name, _ in changes]
    made = [(place, name, change(getattr(place, name))) for place, name, change in changes]
    try:
        for place, name, function in made:
            setattr(place, name, function)
        yield
    finally:
        for place, name, function in reversed(before):
            if function is None:
                # The object had no attribute of its own: the function was its class's.
                delattr(place, name)
            else:
                setattr(place, name, function)
