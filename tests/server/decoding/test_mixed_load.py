"""64 requests of all methods at once through the client: each ends once, as it would have ended alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from fastblt.models.checkpoint import save_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.process.client import EngineClient, LiveRequest
from fastblt.server.request import DecodingMethod, DecodingParams, Delta, FinishReason, Request
from tests.server.decoding.short_sighted import COMMAND
from tests.server.harness import least_memory, model, random_params, random_request, run, settings, with_method
from tests.server.harness import random_decoding as draw

WHICH = 1
REQUESTS = 64
#: Streams are read as they come; what is not streamed is read when it is over.
STREAMED = range(0, REQUESTS, 2)
LEFT = range(0, REQUESTS, 8)
ABORTED = range(2, REQUESTS, 8)


class Ends:
    """Observer that counts the terminal events and joins the bytes of every request."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = defaultdict(list)
        self.reasons: dict[str, FinishReason] = {}
        self.terminal: Counter[str] = Counter()

    def __call__(self, live: LiveRequest, delta: Delta, now: float) -> None:
        name = live.request.request_id
        assert not self.terminal[name], "a delta after the terminal event"
        assert live.started is not None or not delta.ids
        self.ids[name] += delta.ids
        if delta.finish_reason is not None:
            self.terminal[name] += 1
            self.reasons[name] = delta.finish_reason


def test_mixed_load(tmp_path: Path) -> None:
    save_checkpoint(model(WHICH), tmp_path)
    rng = random.Random(64)
    requests = [random_request(rng, f"r{i}", random_params(rng, decoding=draw(rng))) for i in range(REQUESTS)]
    for index in range(0, REQUESTS, 2):
        # Long enough to be cut off in the middle, and for pages to run out.
        params = replace(requests[index].params, max_tokens=100, min_tokens=100, stop=(), ignore_eos=True)
        requests[index] = replace(requests[index], params=params)
    for index in range(0, REQUESTS, 7):
        requests[index] = with_method(requests[index], requests[index].request_id, DecodingParams(DecodingMethod.AUTO))
    assert {request.params.decoding.method for request in requests} == set(DecodingMethod)
    running = {"max_running": 48, "max_pass_rows": 96}
    # For one or two of the longest, and no foresight: many are preempted.
    memory = 3 * least_memory(WHICH, 300, **running) // 2
    tight = settings(**running, model=str(tmp_path), max_waiting=REQUESTS, cache_bytes=memory, threads=1)
    ends = Ends()
    client = EngineClient(tight, observers=[ends], command=COMMAND)
    read = asyncio.run(_serve(client, requests))
    stats = client.stats()
    assert stats.pages_available == stats.pages_total and stats.running == stats.waiting == 0
    assert ends.terminal == Counter({request.request_id: 1 for request in requests})
    for index, request in enumerate(requests):
        name = request.request_id
        alone = run(Engine(model(WHICH), settings()), [request])[name]
        if ends.reasons[name] == FinishReason.ABORT:
            assert index in LEFT or index in ABORTED
            assert ends.ids[name] == alone.ids[: len(ends.ids[name])]
            assert 20 < len(read[name]) < 100 and read[name] == ends.ids[name][: len(read[name])]
        else:
            assert (ends.ids[name], str(ends.reasons[name])) == (alone.ids, alone.reason), request.params
            assert read[name] == alone.ids[: len(read[name])] and (index in LEFT or read[name] == alone.ids)
    # Some may have come to their end before the word to end reached the engine.
    assert FinishReason.ABORT in ends.reasons.values()
    assert stats.preemptions > 0


async def _serve(client: EngineClient, requests: list[Request]) -> dict[str, list[int]]:
    """What the readers of all requests have read."""
    await client.start()
    await client.ready()
    read = await asyncio.gather(*(_read(client, index, request) for index, request in enumerate(requests)))
    await client.stop(30.0)
    return {request.request_id: ids for request, ids in zip(requests, read, strict=True)}


async def _read(client: EngineClient, index: int, request: Request) -> list[int]:
    stream = await client.submit(request)
    ids: list[int] = []
    if index not in STREAMED:
        # Deltas merge until they are read.
        await asyncio.sleep(0.5)
    try:
        async for deltas in stream:
            for delta in deltas:
                ids += delta.ids
                if len(ids) > 20 and index in LEFT:
                    return ids
                if len(ids) > 20 and index in ABORTED:
                    client.abort(request.request_id)
    finally:
        stream.close()
    return ids
