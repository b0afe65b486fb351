"""Runs engines on tiny random models, and draws random requests and schedules for them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

from fastblt.models.blt import Blt
from fastblt.server.decoding.auto import Draft
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.sequence import Sequence
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    Delta,
    EntropyRule,
    Ledger,
    PatchReport,
    Request,
    SamplingParams,
    Unmasking,
)
from fastblt.server.settings import EngineSettings
from tests.tiny import tiny_model

#: A few shapes with a diffusion head, both decoder inputs, with and without windows.
MODELS = (0, 1, 2, 3, 4, 5)


@cache
def model(seed: int) -> Blt:
    return tiny_model(seed, block_sizes=(4, 8), decoder_input=("encoder", "embedding")[seed % 2])


def settings(**overrides: Any) -> EngineSettings:
    defaults: dict[str, Any] = {
        "cache_bytes": 48 << 20,
        "page_size": 16,
        "max_running": 8,
        "max_model_len": 400,
        "max_pass_rows": 64,
        "deterministic": True,
    }
    return EngineSettings(**(defaults | overrides))


def least_memory(which: int, length: int, **overrides: Any) -> int:
    """About the fewest cache bytes with which one request of `length` bytes is taken: two of them do not fit."""
    low = 1 << 14
    while True:
        try:
            if Engine(model(which), settings(**overrides, cache_bytes=low)).max_model_len >= length:
                return low
        except ValueError:
            pass
        low = low * 9 // 8


def short_sighted(engine: Engine) -> Engine:
    """An engine that expects nobody to need pages: it takes in more than fits, and has to preempt."""
    groups = len(engine._caches.groups)
    engine._scheduler._needs = lambda sequences: [0] * groups  # type: ignore[method-assign]
    return engine


def restless(engine: Engine, every: int) -> Engine:
    """An engine that preempts the youngest request in one step of `every`."""
    scheduler, steps = engine._scheduler, count(1)
    admit = scheduler.admit

    def preempting() -> list[Sequence]:
        if next(steps) % every == 0 and len(scheduler.running) > 1:
            scheduler.preempt(max(scheduler.running, key=lambda one: one.number))
        return admit()

    scheduler.admit = preempting  # type: ignore[method-assign]
    return engine


class Fickle(DraftController):
    """Names any draft at any time."""

    def __init__(self, drafts: list[Draft], rng: random.Random) -> None:
        self.drafts, self._rng = drafts, rng
        self.named: set[Draft] = set()

    def next(self) -> Draft:
        draft = self._rng.choice(self.drafts)
        self.named.add(draft)
        return draft

    def ended(self, draft: Draft) -> None:
        assert draft in self.drafts

    def step_ended(self, *of_a_pass: object) -> None:
        pass

    def filtered(self, draft: Draft, proposed: int, passed: int) -> None:
        assert draft in self.drafts and passed <= proposed

    def round_ended(self, draft: Draft, drafted: int, accepted: int) -> None:
        assert draft in self.drafts and accepted <= drafted <= draft.length


def fickle(engine: Engine, seed: int) -> Fickle:
    """Has an engine's `auto` draft anything at any time, by the controller that is returned."""
    sizes = engine.config.block_sizes
    drafts = [Draft(), *(Draft(DecodingMethod.BLT_S, length) for length in (1, 3, 16))]
    drafts += [Draft(DecodingMethod.BLT_DV, size) for size in sizes]
    drafts += [Draft(DecodingMethod.BLT_DSV, length, size) for size in sizes for length in (3, 16)]
    engine._context.controller = controller = Fickle(drafts, random.Random(seed))
    return controller


@dataclass
class Finished:
    """A request's whole output, as its deltas gave it."""

    ids: list[int]
    reason: str
    error: str | None
    ledger: Ledger
    deltas: list[Delta]

    @property
    def patches(self) -> PatchReport:
        report = self.deltas[-1].patches
        assert report is not None, "patches were not asked for"
        return report


def run(
    engine: Engine,
    requests: list[Request],
    arrivals: list[int] | None = None,
    aborts: dict[str, int] | None = None,
) -> dict[str, Finished]:
    """Run requests to their ends; request i arrives before step `arrivals[i]`. Checks one terminal event each."""
    arrivals = arrivals or [0] * len(requests)
    aborts = dict(aborts or {})
    waiting = sorted(zip(arrivals, range(len(requests)), strict=True))
    deltas: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    step = 0
    while waiting or engine.has_work():
        while waiting and waiting[0][0] <= step:
            engine.add(requests[waiting.pop(0)[1]])
        for request_id in [i for i, at in aborts.items() if at <= step]:
            engine.abort(request_id)
            del aborts[request_id]
        for delta in engine.step():
            assert not any(d.finish_reason for d in deltas[delta.request_id]), "a delta after the terminal event"
            deltas[delta.request_id].append(delta)
        step += 1
        assert step < 50_000, "the engine does not come to an end"
    done = {}
    for request_id, own in deltas.items():
        last = own[-1]
        assert last.finish_reason is not None and last.ledger is not None
        ids = [i for delta in own for i in delta.ids]
        done[request_id] = Finished(ids, str(last.finish_reason), last.error, last.ledger, own)
    assert engine.balanced(), engine.stats()
    return done


def random_params(rng: random.Random, **overrides: Any) -> SamplingParams:
    """Greedy or seeded, with some of the penalties, truncations and stops."""
    params: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 5, 17, 40)),
        "temperature": rng.choice((0.0, 0.0, 0.3, 0.7, 1.0, 1.5)),
        "seed": rng.randrange(2**63),
        "top_k": rng.choice((0, 0, 5, 40)),
        "top_p": rng.choice((1.0, 1.0, 0.9, 0.5)),
        "min_p": rng.choice((0.0, 0.0, 0.05)),
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        params |= {
            "presence_penalty": rng.uniform(-1, 1),
            "frequency_penalty": rng.uniform(-1, 1),
            "repetition_penalty": rng.choice((1.0, 1.3)),
            "logit_bias": {rng.randrange(4, 260): rng.uniform(-5, 5) for _ in range(3)},
        }
    if rng.random() < 0.3:
        params["stop"] = tuple(bytes(rng.choices(range(256), k=rng.randint(1, 2))) for _ in range(8))
    if rng.random() < 0.2:
        params["min_tokens"] = rng.randint(0, params["max_tokens"])
    return SamplingParams(**(params | overrides))


def random_decoding(rng: random.Random) -> DecodingParams:
    method = rng.choice(("blt", "blt-d", "blt-s", "blt-dv", "blt-dsv"))
    if method == "blt":
        return DecodingParams(DecodingMethod.BLT)
    if method == "blt-s":
        return DecodingParams(
            DecodingMethod.BLT_S, draft_length=rng.choice((1, 4, 8, 16, 32)), paper_accounting=rng.random() < 0.2
        )
    unmasking = rng.choice(list(Unmasking))
    of_rule: dict[Unmasking, dict[str, Any]] = {
        Unmasking.CONFIDENCE: {"confidence_threshold": rng.choice((0.05, 0.3, 0.7))},
        Unmasking.ENTROPY: {
            "entropy_bound": rng.choice((0.8, 4.0, 12.0)),
            "entropy_rule": rng.choice(list(EntropyRule)),
        },
        Unmasking.ONE_STEP: {},
    }
    if unmasking != Unmasking.ONE_STEP:
        of_rule[unmasking]["max_steps"] = rng.choice((None, None, 1, 3))
    return DecodingParams(
        DecodingMethod(method),
        block_size=rng.choice((4, 8)),
        draft_length=rng.choice((1, 3, 8, 16, 32)) if method == "blt-dsv" else None,
        unmasking=unmasking,
        align_blocks=method == "blt-d" and rng.random() < 0.3,
        paper_accounting=method == "blt-dv" and rng.random() < 0.3,
        **of_rule[unmasking],
    )


def random_request(rng: random.Random, name: str, params: SamplingParams | None = None, **overrides: Any) -> Request:
    prompt = [1] + [rng.randrange(4, 260) for _ in range(rng.choice((0, 1, 5, 30, 90, 150)))]
    params = params or random_params(rng, decoding=random_decoding(rng), **overrides)
    return Request(name, prompt, params, time.monotonic())


def with_method(request: Request, name: str, decoding: DecodingParams) -> Request:
    """The same request under another decoding method."""
    return replace(request, request_id=name, params=replace(request.params, decoding=decoding))
