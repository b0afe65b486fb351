"""Properties of the scheduler on virtual time: the engine is real, only its passes are made of curves."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.benchmarks.simulation.runner import Machine
from fastblt.benchmarks.simulation.simulate import Job, Seen, percentile, simulate, simulated
from fastblt.server.engine import prompts
from fastblt.server.engine.pass_time import PassTime

seeds = strategies.integers(0, 2**32)
few = hypothesis_settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: About what two cores take for the shipped checkpoint, and a machine that takes most for reading weights.
SMALL = Machine.linear(3e-4, 7e-5, 2e-4, 1.2e-4, per_depth=3e-8, per_step=1e-3, per_request=2e-5)
LARGE = Machine.linear(2e-2, 2e-5, 5e-5, 2e-5, per_step=2e-3, per_request=2e-5)
MACHINES = (SMALL, LARGE)


def text(rng: random.Random, length: int) -> list[int]:
    return [1, *rng.choices(range(4, 260), k=length - 1)]


def by_time(jobs: list[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: job.at)


def firsts(seen: list[Seen], shorter: int) -> list[float]:
    return [one.first for one in seen if len(one.job.ids) < shorter]


@pytest.mark.parametrize("count", [1, 8, 40])
def test_short_requests_beside_long_prompts(count: int) -> None:
    rng = random.Random(count)
    long = [Job(0.0, text(rng, 30_000), 16) for _ in range(count)]
    short = [Job(0.5 + at, text(rng, 50), 16) for at in range(12)]
    stream = Job(0.0, text(rng, 100), 3000)
    seen = simulate(simulated(SMALL), by_time([*long, *short, stream]), until=12.0)
    assert max(firsts([one for one in seen if one.job.output == 16], 100)) < 0.3
    [gaps] = [one.gaps for one in seen if one.job.output == 3000]
    assert percentile(gaps, 0.99) < 0.15


def test_short_requests_pass_while_long_outputs_hold_all_places() -> None:
    rng = random.Random(0)
    long = [Job(0.0, text(rng, 200), 2000) for _ in range(64)]
    short = [Job(2.0 + at, text(rng, 50), 16) for at in range(10)]
    where = simulated(SMALL, max_running=64)
    seen = simulate(where, long + short)
    assert where.engine.stats().turns >= 10
    assert max(firsts(seen, 100)) < 0.6
    # What the turns cost.
    alone = simulated(SMALL, max_running=64)
    simulate(alone, long)
    assert where.clock.now < 1.05 * alone.clock.now


def test_more_long_outputs_than_places_take_turns() -> None:
    """All of 24 go on, with 8 places: none waits for the end of another."""
    rng = random.Random(0)
    long = [Job(0.0, text(rng, 200), 3000) for _ in range(24)]
    where = simulated(SMALL, max_running=8)
    seen = simulate(where, long)
    assert max(one.first for one in seen) < 2.0
    assert max(max(one.gaps) for one in seen) < 30.0
    assert where.engine.stats().preemptions == 0 and where.engine.balanced()


@few
@given(seeds)
def test_a_flood_of_short_requests_starves_no_long_one(seed: int) -> None:
    """More short requests than the machine can serve. The long one comes after those that are due before it, which is
    after ten times its own time; then it has a quarter of every pass."""
    rng = random.Random(seed)
    own = 3000
    flood = [Job(at * 0.02, text(rng, 500), 1) for at in range(800)]
    long = Job(1.0, text(rng, own), 1)
    machine = rng.choice(MACHINES)
    where = simulated(machine, max_waiting=2000, max_running=rng.choice((8, 64)), prefix_cache=rng.random() < 0.5)
    time = PassTime(machine.curves, machine.per_depth, 0.1)
    takes = time.prompt_seconds(own, 0.3)
    seen = simulate(where, by_time([*flood, long]))
    [late] = [one for one in seen if one.job is long]
    before = max(one.end for one in seen if one.job is not long and one.job.at < long.at + 10 * takes)
    assert late.times[0] <= before + 5 * takes + 0.5


@few
@given(seeds)
def test_nobody_waits_longer_than_a_multiple_of_its_own_work(seed: int) -> None:
    """Random arrivals at 95 % of what the machine can do: first byte within 3 s and 30 times the prompt's own time."""
    rng = random.Random(seed)
    # Of a machine that needs full batches less is left for random arrivals.
    machine, load = rng.choice(((SMALL, 0.95), (LARGE, 0.7)))
    jobs = [Job(0.0, text(rng, int(10 ** rng.uniform(1, 4))), rng.choice((1, 20, 100))) for _ in range(150)]
    rushed = simulated(machine)
    simulate(rushed, jobs)
    gap = rushed.clock.now / len(jobs) / load
    at = 0.0
    for job in jobs:
        at += rng.expovariate(1 / gap)
        job.at = at
    time = PassTime(machine.curves, machine.per_depth, 0.1)
    for one in simulate(simulated(machine), jobs):
        assert one.first < 3.0 + 30 * time.prompt_seconds(len(one.job.ids), 0.3), (len(one.job.ids), one.first)


@few
@given(seeds)
def test_sharing_delays_nobody(seed: int) -> None:
    """Some prompts begin alike. With sharing first bytes come no later than without: on average, and the last."""
    rng = random.Random(seed)
    common = [text(rng, rng.choice((200, 2000, 8000))) for _ in range(2)]
    jobs = []
    for _ in range(30):
        ids = rng.choice((common[0], common[1], [1])) + text(rng, rng.choice((20, 300, 3000)))[1:]
        jobs.append(Job(rng.choice((0.0, rng.uniform(0, 3))), ids, 2, salt=rng.choice((None, None, "a"))))
    jobs = by_time(jobs)
    machine = rng.choice(MACHINES)
    together = simulate(simulated(machine), jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts.Leaders, "lead", lambda *_: False)
        apart = simulate(simulated(machine), jobs)
    for of_all, slack in ((statistics.mean, 0.05), (max, 0.15)):
        assert of_all([one.first for one in together]) <= of_all([one.first for one in apart]) * 1.02 + slack


@few
@given(seeds)
def test_prompts_that_share_nothing_do_not_notice(seed: int) -> None:
    rng = random.Random(seed)
    jobs = by_time([Job(rng.uniform(0, 2), text(rng, rng.choice((20, 300, 3000))), 5) for _ in range(20)])
    machine = rng.choice(MACHINES)
    together = simulate(simulated(machine), jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts.Leaders, "lead", lambda *_: False)
        apart = simulate(simulated(machine), jobs)
    assert [one.times for one in together] == [one.times for one in apart]


def test_a_prompt_of_many_choices_takes_as_long_as_one() -> None:
    rng = random.Random(0)
    prompt = text(rng, 20_000)
    one = simulate(simulated(SMALL), [Job(0.0, prompt, 1)])
    many = simulate(simulated(SMALL), [Job(0.0, prompt, 1) for _ in range(16)])
    assert max(seen.first for seen in many) < 1.2 * one[0].first


def test_little_memory_ends_without_a_chase() -> None:
    """24 prompts of 3.3 kB in 32 MiB: hardly anybody is put back."""
    rng = random.Random(0)
    where = simulated(SMALL, cache_bytes=32 << 20)
    seen = simulate(where, [Job(0.0, text(rng, 3300), 200) for _ in range(24)])
    assert all(one.end for one in seen)
    assert where.engine.stats().preemptions <= 24
    plenty = simulated(SMALL)
    simulate(plenty, [Job(0.0, text(rng, 3300), 200) for _ in range(24)])
    assert where.clock.now < 2.5 * plenty.clock.now
    assert where.engine.balanced()
