"""The engine's thread and its client, with an engine that can be made to fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.engine.client import DeltaStream, EngineClient, EngineState, EngineUnavailableError
from server.request import (
    ByteLogprobs,
    Delta,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingParams,
)
from server.settings import EngineSettings
from tests.server.api.fake_engine import REPEATED, FakeEngine


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, [1, 70], SamplingParams(max_tokens=max_tokens), time.monotonic())


@asynccontextmanager
async def running(engine: FakeEngine, **settings: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineSettings(**settings), load=lambda _: engine)  # type: ignore[arg-type,return-value]
    await client.start()
    await client.ready()
    try:
        yield client
    finally:
        await client.stop()
        assert not client._live and not client._verdicts


async def read(stream: DeltaStream) -> dict[str, Delta]:
    """Everything of a stream, merged by request."""
    whole: dict[str, Delta] = {}
    async for news in stream:
        for delta in news:
            earlier = whole.setdefault(delta.request_id, Delta(delta.request_id))
            assert earlier.finish_reason is None, "news after the end"
            earlier.ids += delta.ids
            earlier.finish_reason, earlier.error = delta.finish_reason, delta.error
    return whole


async def test_each_request_gets_its_deltas_and_the_engine_one_thread() -> None:
    engine = FakeEngine()
    async with running(engine) as client:
        streams = [await client.submit(request(f"r{i}", i + 1)) for i in range(5)]
        for i, whole in enumerate(await asyncio.gather(*map(read, streams))):
            assert whole[f"r{i}"].ids == [REPEATED] * (i + 1)
            assert whole[f"r{i}"].finish_reason is FinishReason.LENGTH
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


async def test_requests_submitted_together_share_a_stream() -> None:
    async with running(FakeEngine()) as client:
        whole = await read(await client.submit(request("a", 3), request("b", 6)))
        assert [len(whole[name].ids) for name in "ab"] == [3, 6]


async def test_an_idle_engine_blocks() -> None:
    engine = FakeEngine()
    async with running(engine) as client:
        await read(await client.submit(request("a")))
        steps, cpu = engine.steps, time.process_time()
        await asyncio.sleep(0.3)
        assert engine.steps == steps
        assert time.process_time() - cpu < 0.1


async def test_refusals_reach_the_caller_and_leave_nothing() -> None:
    engine = FakeEngine(refuse=True)
    async with running(engine) as client:
        with pytest.raises(InvalidRequestError, match="refused"):
            await client.submit(request("a"))
        engine.refuse = False
        assert (await read(await client.submit(request("a"))))["a"].finish_reason is FinishReason.LENGTH


async def test_all_or_none_when_the_queue_fills_up_midway() -> None:
    engine = FakeEngine(max_waiting=2)
    async with running(engine) as client:
        with pytest.raises(QueueFullError):
            await client.submit(*(request(f"r{i}", 1000) for i in range(3)))
        assert set(engine.aborted) == {"r0", "r1"}
        assert (await read(await client.submit(request("next"))))["next"].finish_reason is FinishReason.LENGTH


async def test_more_requests_than_the_queue_can_ever_hold_are_invalid() -> None:
    async with running(FakeEngine(), max_waiting=2) as client:
        with pytest.raises(InvalidRequestError):
            await client.submit(*(request(f"r{i}") for i in range(3)))


async def test_submissions_are_bounded_while_the_engine_is_busy() -> None:
    engine = FakeEngine(pause=0.2)
    async with running(engine, max_waiting=3) as client:
        stream = await client.submit(request("first", 100))
        results = await asyncio.gather(*(client.submit(request(f"r{i}")) for i in range(5)), return_exceptions=True)
        assert [isinstance(result, QueueFullError) for result in results] == [False] * 3 + [True] * 2
        for result in [stream, *results]:
            if isinstance(result, DeltaStream):
                result.close()


async def test_closing_a_stream_aborts_what_is_unfinished() -> None:
    engine = FakeEngine(pause=0.001)
    async with running(engine) as client:
        stream = await client.submit(request("short", 1), request("long", 10**6))
        finished = False
        while not finished:
            finished = any(delta.finish_reason for delta in await anext(stream))
        stream.close()
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        while engine.live:
            await asyncio.sleep(0.01)
        assert engine.aborted == ["long"]


async def test_a_submission_given_up_is_aborted() -> None:
    engine = FakeEngine(pause=0.1)
    async with running(engine) as client:
        first = await client.submit(request("first", 10**6))
        task = asyncio.create_task(client.submit(request("second", 10**6)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while "second" not in engine.aborted or "second" in engine.live:
            await asyncio.sleep(0.01)
        first.close()


async def test_news_is_merged_for_a_slow_reader() -> None:
    async with running(FakeEngine()) as client:
        stream = await client.submit(request("a", 500))
        while client._live:
            await asyncio.sleep(0.01)
        [delta] = await anext(stream)
        assert delta.ids == [REPEATED] * 500 and delta.finish_reason is FinishReason.LENGTH
        assert delta.ledger is not None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_merging_keeps_logprobs() -> None:
    stream = DeltaStream(lambda _: None, [request("a")])
    one, two = ByteLogprobs(-1.0, []), ByteLogprobs(-2.0, [])
    stream.push(Delta("a"))
    stream.push(Delta("a", [5], [one]))
    stream.push(Delta("a", [6], [two], FinishReason.STOP, stop_reason="x"))
    [delta] = await anext(stream)
    assert (delta.ids, delta.logprobs, delta.stop_reason) == ([5, 6], [one, two], "x")


async def test_a_failed_step_ends_every_request_and_the_engine() -> None:
    engine = FakeEngine(fail_at=20, pause=0.01)
    async with running(engine) as client:
        streams = [await client.submit(request(f"r{i}", 100)) for i in range(4)]
        results = await asyncio.gather(*map(read, streams))
        for i, whole in enumerate(results):
            assert whole[f"r{i}"].finish_reason is FinishReason.ERROR
            # What the exception says is for the log.
            assert "RuntimeError" in str(whole[f"r{i}"].error) and "secret" not in str(whole[f"r{i}"].error)
        assert client.state is EngineState.DEAD
        with pytest.raises(EngineUnavailableError):
            await client.submit(request("late"))
    assert client.state is EngineState.DEAD


async def test_a_failed_load_is_reported() -> None:
    def load(_: EngineSettings) -> Any:
        raise ValueError("no such folder")

    client = EngineClient(EngineSettings(), load=load)
    await client.start()
    with pytest.raises(EngineUnavailableError, match="no such folder"):
        await client.ready()
    assert client.state is EngineState.DEAD
    await client.stop()


async def test_nothing_is_taken_while_loading_and_stopping_waits_for_it() -> None:
    loading = threading.Event()

    def load(_: EngineSettings) -> Any:
        loading.wait(10)
        return FakeEngine()

    client = EngineClient(EngineSettings(), load=load)
    await client.start()
    with pytest.raises(EngineUnavailableError) as caught:
        await client.submit(request("a"))
    assert caught.value.state is EngineState.LOADING
    waiter = asyncio.create_task(client.ready())
    stopping = asyncio.create_task(client.stop())
    await asyncio.sleep(0.05)
    loading.set()
    await stopping
    with pytest.raises(EngineUnavailableError):
        await waiter
    assert client.state is EngineState.STOPPED


async def test_stop_lets_requests_finish_and_takes_no_more() -> None:
    async with running(FakeEngine(pause=0.01)) as client:
        reader = asyncio.create_task(read(await client.submit(request("a", 20))))
        stopping = asyncio.create_task(client.stop(timeout=10))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError) as caught:
            await client.submit(request("late"))
        assert caught.value.state is EngineState.DRAINING
        await stopping
        assert (await reader)["a"].finish_reason is FinishReason.LENGTH


async def test_stop_aborts_what_takes_too_long() -> None:
    async with running(FakeEngine(pause=0.01)) as client:
        reader = asyncio.create_task(read(await client.submit(request("a", 10**6))))
        await client.stop(timeout=0.1)
        whole = await reader
        assert whole["a"].finish_reason is FinishReason.ABORT and whole["a"].ids
