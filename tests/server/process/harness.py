"""A client whose engine can be made to fail, and what its tests ask of it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastblt.server.process.client import EngineClient, LiveRequest
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import (
    Delta,
    FinishReason,
    Request,
    SamplingParams,
)
from fastblt.server.settings import EngineSettings, ServiceSettings
from tests.server.api.fake_engine import command


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, [1, 70], SamplingParams(max_tokens=max_tokens), time.monotonic())


class Ends:
    """Observer that counts the ends of requests, read or not."""

    def __init__(self) -> None:
        self.reasons: dict[str, FinishReason] = {}
        self.counts: Counter[str] = Counter()

    def __call__(self, live: LiveRequest, delta: Delta, now: float) -> None:
        if delta.finish_reason is not None:
            self.counts[live.request.request_id] += 1
            self.reasons[live.request.request_id] = delta.finish_reason


def client_of(
    settings: dict[str, Any] | None = None, service: ServiceSettings | None = None, **fields: Any
) -> EngineClient:
    return EngineClient(EngineSettings(**settings or {}), service, command=command(**fields), observers=[Ends()])


@asynccontextmanager
async def running(
    settings: dict[str, Any] | None = None, service: ServiceSettings | None = None, **fields: Any
) -> AsyncIterator[EngineClient]:
    client = client_of(settings, service, **fields)
    await client.start()
    await client.ready()
    try:
        yield client
    finally:
        await client.stop()
        assert not client._live and not client._pending_adds and client._queued == 0
        assert client.pid is not None and not alive(client.pid)
        assert set(ends(client).counts.values()) <= {1}


def ends(client: EngineClient) -> Ends:
    [observer] = client.observers
    assert isinstance(observer, Ends)
    return observer


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def read(stream: DeltaStream) -> dict[str, Delta]:
    """Everything of a stream, merged by request."""
    whole: dict[str, Delta] = {}
    async for deltas in stream:
        for delta in deltas:
            earlier = whole.setdefault(delta.request_id, Delta(delta.request_id))
            assert earlier.finish_reason is None, "a delta after the end"
            earlier.ids += delta.ids
            earlier.finish_reason, earlier.error, earlier.error_code = (
                delta.finish_reason,
                delta.error,
                delta.error_code,
            )
    return whole
