"""A late device gives the bytes of the plain engine: nothing that a pass reads is changed before it has run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fastblt.server.engine.cache.kv_caches import PageTables
from fastblt.server.engine.engine import Engine
from fastblt.server.request import Request
from fastblt.server.settings import EngineSettings
from tests.server.engine.late import LateQueue, late_engine
from tests.server.harness import (
    MODELS,
    least_memory,
    model,
    random_decoding,
    random_params,
    random_request,
    run,
    settings,
)

#: Of the 200 schedules, those that one test runs.
PART = 25


def schedule(seed: int) -> tuple[int, EngineSettings, list[Request], list[int]]:
    """A model, settings, and requests of random methods with their arrivals; some begin alike."""
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    chosen = {
        "max_pass_rows": rng.choice((5, 16, 64, 300)),
        "max_passes_per_beat": rng.choice((1, 2, 64)),
        "page_size": rng.choice((4, 16)),
        "max_running": rng.choice((2, 4)),
        "max_model_len": 250,
    }
    if rng.random() < 0.3:
        chosen["cache_bytes"] = least_memory(which, 170, **chosen)
    head = [1] + [rng.randrange(4, 260) for _ in range(rng.choice((20, 70)))]
    requests = []
    for at in range(rng.randint(2, 4)):
        params = random_params(rng, decoding=random_decoding(rng))
        request = random_request(rng, f"r{at}", replace(params, max_tokens=rng.choice((1, 9, 25)), min_tokens=0))
        prompt = request.prompt_ids[:60]
        requests.append(replace(request, prompt_ids=head + prompt[1:] if rng.random() < 0.5 else prompt))
    return which, settings(**chosen), requests, [rng.randrange(30) for _ in requests]


@pytest.mark.parametrize("part", range(200 // PART))
def test_the_bytes_of_the_plain_engine(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = 0
    for seed in range(part * PART, (part + 1) * PART):
        which, how, requests, arrivals = schedule(seed)
        with monkeypatch.context() as patch:
            expected = run(Engine(model(which), how), requests, arrivals)
            engine = late_engine(patch, model(which), how, random.Random(seed))
            late = run(engine, requests, arrivals)
        hits += engine.stats().prefix_hits
        for name, done in expected.items():
            assert (late[name].ids, late[name].reason) == (done.ids, done.reason), (seed, name)
    assert hits


def test_a_table_of_another_moment_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can fail: here passes read the page table as the host has it when they run."""
    wrong = 0
    for seed in range(12):
        which, how, requests, arrivals = schedule(seed)
        with monkeypatch.context() as patch:
            expected = run(Engine(model(which), how), requests, arrivals)
            engine = late_engine(patch, model(which), how)
            tables, queue = engine._caches.tables, engine._caches.queue
            assert isinstance(queue, LateQueue)
            patch.setattr(PageTables, "changes", lambda self: None)
            queue.before = lambda tables=tables: tables.device.copy_(torch.from_numpy(tables.host))
            late = run(engine, requests, arrivals)
        wrong += any(late[name].ids != done.ids for name, done in expected.items())
    assert wrong
