"""Streams of deltas: closing, merging, bounds, and the time between items."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import (
    ByteLogprobs,
    Delta,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingParams,
)
from tests.server.api.fake_engine import REPEATED
from tests.server.process.harness import ends, read, request, running


async def test_closing_a_stream_aborts_what_is_unfinished() -> None:
    async with running(pause=0.001) as client:
        stream = await client.submit(request("short", 1), request("long", 10**6))
        finished = False
        while not finished:
            finished = any(delta.finish_reason for delta in await anext(stream))
        stream.close()
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        while client._live:
            await asyncio.sleep(0.01)
        assert ends(client).reasons == {"short": FinishReason.LENGTH, "long": FinishReason.ABORT}


async def test_a_submission_given_up_is_aborted() -> None:
    async with running(pause=0.1) as client:
        first = await client.submit(request("first", 10**6))
        task = asyncio.create_task(client.submit(request("second", 10**6)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while "second" in client._live:
            await asyncio.sleep(0.01)
        assert ends(client).reasons == {"second": FinishReason.ABORT}
        first.close()


async def test_news_is_merged_for_a_slow_reader() -> None:
    async with running() as client:
        stream = await client.submit(request("a", 500))
        while client._live:
            await asyncio.sleep(0.01)
        [delta] = await anext(stream)
        assert delta.ids == [REPEATED] * 500 and delta.finish_reason is FinishReason.LENGTH
        assert delta.ledger is not None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_whole_outputs_come_at_their_end_or_at_the_first_failure() -> None:
    async with running(pause=0.005) as client:
        stream = await client.submit(request("a", 5), request("b", 50), whole=True)
        deltas = await anext(stream)
        assert {delta.request_id: len(delta.ids) for delta in deltas} == {"a": 5, "b": 50}
        assert all(delta.finish_reason is FinishReason.LENGTH for delta in deltas)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    async with running(pause=0.005, error_for="bad") as client:
        stream = await client.submit(request("good", 10**6), request("bad", 10**6), whole=True)
        deltas = await anext(stream)
        assert [delta.request_id for delta in deltas if delta.finish_reason] == ["bad"]
        stream.close()


async def test_merging_keeps_logprobs() -> None:
    stream = DeltaStream(lambda *_: None, [request("a")])
    one, two = ByteLogprobs(-1.0), ByteLogprobs(-2.0)
    stream.push(Delta("a"))
    stream.push(Delta("a", [5], [one]))
    stream.push(Delta("a", [6], [two], FinishReason.STOP, stop_reason="x"))
    [delta] = await anext(stream)
    assert (delta.ids, delta.logprobs, delta.stop_reason) == ([5, 6], [one, two], "x")


async def test_logprobs_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(name: str, max_tokens: int) -> Request:
        return Request(name, [1, 5], SamplingParams(max_tokens=max_tokens, logprobs=20), time.monotonic())

    assert asking("a", 1000).logprob_bytes == 1000 * (208 + 6 * 20)
    monkeypatch.setattr("fastblt.server.process.client.MAX_LOGPROB_BYTES", 1000 * (208 + 6 * 20))
    async with running(pause=0.005) as client:
        with pytest.raises(InvalidRequestError, match="logprobs of up to") as refused:
            await client.submit(asking("a", 600), asking("b", 600))
        assert refused.value.param == "logprobs"
        first, second = await client.submit(asking("a", 600)), await client.submit(asking("b", 400))
        with pytest.raises(QueueFullError, match="logprobs"):
            await client.submit(asking("c", 1))
        # Others are not concerned, and what was read or given up is free again.
        await read(await client.submit(request("d")))
        second.close()
        third = await client.submit(asking("e", 400))
        for stream in (first, third):
            stream.close()
        assert sum(stream.logprob_bytes for stream in client._streams) == 0
        assert len((await read(await client.submit(asking("f", 5))))["f"].ids) == 5
        await client.submit(asking("g", 1000))


async def test_items_keep_their_distance_but_for_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # Far more than a busy machine's hiccups.
    monkeypatch.setattr("fastblt.server.process.stream.ITEM_SECONDS", distance := 1.0)
    stream = DeltaStream(lambda *_: None, [request("a")])
    loop = asyncio.get_running_loop()
    stream.push(Delta("a", [5]))
    start = loop.time()
    [delta] = await anext(stream)
    assert delta.ids == [5] and loop.time() - start < distance
    stream.push(Delta("a", [6]))
    loop.call_later(distance / 4, stream.push, Delta("a", [7]))
    [delta] = await anext(stream)
    assert delta.ids == [6, 7] and loop.time() - start >= distance
    start = loop.time()
    stream.push(Delta("a", [8]))
    loop.call_later(distance / 4, stream.push, Delta("a", [9], None, FinishReason.LENGTH))
    [delta] = await anext(stream)
    assert delta.ids == [8, 9] and loop.time() - start < distance
