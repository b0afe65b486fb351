"""The engine process and its client, with an engine that can be made to fail."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastblt.server.process.client import EngineClient, EngineState, EngineUnavailableError, LiveRequest
from fastblt.server.process.engine_process import EngineProcess
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import (
    ByteLogprobs,
    Delta,
    ErrorCode,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingParams,
)
from fastblt.server.settings import EngineSettings, FailurePolicy, ServiceSettings
from tests.server.api.fake_engine import REPEATED, command


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
            assert earlier.finish_reason is None, "news after the end"
            earlier.ids += delta.ids
            earlier.finish_reason, earlier.error, earlier.error_code = (
                delta.finish_reason,
                delta.error,
                delta.error_code,
            )
    return whole


async def test_each_request_gets_its_deltas_and_the_engine_a_process() -> None:
    async with running() as client:
        streams = [await client.submit(request(f"r{i}", i + 1)) for i in range(5)]
        for i, whole in enumerate(await asyncio.gather(*map(read, streams))):
            assert whole[f"r{i}"].ids == [REPEATED] * (i + 1)
            assert whole[f"r{i}"].finish_reason is FinishReason.LENGTH
        assert client.pid not in (None, os.getpid())


async def test_requests_submitted_together_share_a_stream() -> None:
    async with running() as client:
        whole = await read(await client.submit(request("a", 3), request("b", 6)))
        assert [len(whole[name].ids) for name in "ab"] == [3, 6]


async def test_an_idle_engine_blocks() -> None:
    async with running() as client:
        await read(await client.submit(request("a")))
        before = processor_seconds(client)
        await asyncio.sleep(0.5)
        assert processor_seconds(client) - before < 0.1


def processor_seconds(client: EngineClient) -> float:
    fields = Path(f"/proc/{client.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_refusals_reach_the_caller_and_leave_nothing() -> None:
    async with running(refuse=True) as client:
        with pytest.raises(InvalidRequestError, match="refused") as caught:
            await client.submit(request("a"))
        assert caught.value.param == "prompt"
        assert not client._live and client.state is EngineState.READY


async def test_all_or_none_when_the_queue_fills_up_midway() -> None:
    async with running(max_waiting=2) as client:
        with pytest.raises(QueueFullError):
            await client.submit(*(request(f"r{i}", 1000) for i in range(3)))
        # Those that had been taken are gone from the engine: there is room again.
        whole = await read(await client.submit(request("a"), request("b")))
        assert [whole[name].finish_reason for name in "ab"] == [FinishReason.LENGTH] * 2


async def test_more_requests_than_the_queue_can_ever_hold_are_invalid() -> None:
    async with running({"max_waiting": 2}) as client:
        with pytest.raises(InvalidRequestError):
            await client.submit(*(request(f"r{i}") for i in range(3)))


async def test_submissions_are_bounded_while_the_engine_is_busy() -> None:
    async with running({"max_waiting": 3}, pause=0.2) as client:
        stream = await client.submit(request("first", 100))
        await anext(stream)
        results = await asyncio.gather(*(client.submit(request(f"r{i}")) for i in range(5)), return_exceptions=True)
        assert [isinstance(result, QueueFullError) for result in results] == [False] * 3 + [True] * 2
        for result in [stream, *results]:
            if isinstance(result, DeltaStream):
                result.close()


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


async def test_a_failed_step_ends_every_request_and_the_engine() -> None:
    async with running(fail_at=20, pause=0.01) as client:
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


async def test_a_killed_process_ends_every_request_and_is_named() -> None:
    async with running(pause=0.01) as client:
        stream = await client.submit(request("a", 10**6))
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        whole = await read(stream)
        assert whole["a"].finish_reason is FinishReason.ERROR and "SIGKILL" in str(whole["a"].error)
        assert client.state is EngineState.DEAD and "SIGKILL" in client.reason


async def test_the_process_goes_with_its_server() -> None:
    async with running(pause=0.01) as client:
        await client.submit(request("a", 10**6))
        process = client._supervisor._process
        assert process is not None and process._transport is not None
        process._transport.abort()
        async with asyncio.timeout(5):
            while client.state is not EngineState.DEAD:
                await asyncio.sleep(0.01)
        # It left by itself.
        assert "status 0" in client.reason


async def test_a_process_that_talks_nonsense_is_killed() -> None:
    client = EngineClient(
        EngineSettings(), command=["/bin/sh", "-c", "printf '\\000\\000\\000\\001\\000' >&0; sleep 60"]
    )
    await client.start()
    with pytest.raises(EngineUnavailableError, match="SIGKILL"):
        await client.ready()
    await client.stop()


async def test_a_command_that_is_not_there() -> None:
    client = EngineClient(EngineSettings(), command=["/nowhere/at/all"])
    await client.start()
    with pytest.raises(EngineUnavailableError, match="cannot be started"):
        await client.ready()
    await client.stop()


async def test_a_failed_load_is_reported() -> None:
    client = client_of(fail_to_load="no such folder")
    await client.start()
    with pytest.raises(EngineUnavailableError, match="no such folder"):
        await client.ready()
    assert client.state is EngineState.DEAD
    await client.stop()


async def test_nothing_is_taken_while_loading_and_stopping_does_not_wait_for_it(tmp_path: Path) -> None:
    client = client_of(gate=str(tmp_path / "never"))
    await client.start()
    with pytest.raises(EngineUnavailableError) as caught:
        await client.submit(request("a"))
    assert caught.value.state is EngineState.LOADING
    waiter = asyncio.create_task(client.ready())
    await asyncio.sleep(0)
    async with asyncio.timeout(3):
        await client.stop(60.0)
    with pytest.raises(EngineUnavailableError):
        await waiter
    assert client.state is EngineState.STOPPED


async def test_stop_lets_requests_finish_and_takes_no_more() -> None:
    async with running(pause=0.01) as client:
        reader = asyncio.create_task(read(await client.submit(request("a", 20))))
        stopping = asyncio.create_task(client.stop(timeout=10))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError) as caught:
            await client.submit(request("late"))
        assert caught.value.state is EngineState.DRAINING
        await stopping
        assert (await reader)["a"].finish_reason is FinishReason.LENGTH


async def test_stop_aborts_what_takes_too_long() -> None:
    async with running(pause=0.01) as client:
        reader = asyncio.create_task(read(await client.submit(request("a", 10**6))))
        await client.stop(timeout=0.1)
        whole = await reader
        assert whole["a"].finish_reason is FinishReason.ABORT and whole["a"].ids


async def until_state(client: EngineClient, state: EngineState, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while client.state is not state:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("busy", [True, False])
async def test_a_stopped_process_is_seen_within_the_limit_and_may_come_back(busy: bool) -> None:
    async with running(service=ServiceSettings(stall_timeout=1.0), pause=0.01) as client:
        stream = await client.submit(request("a", 10**6)) if busy else None
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await until_state(client, EngineState.STALLED, 1.0)
        with pytest.raises(EngineUnavailableError, match="no progress"):
            await client.submit(request("b"))
        os.kill(client.pid, signal.SIGCONT)
        await until_state(client, EngineState.READY)
        if stream is not None:
            assert (await anext(stream))[0].ids
            stream.close()


async def test_a_process_that_stays_stopped_is_killed() -> None:
    async with running(service=ServiceSettings(stall_timeout=0.5), pause=0.01) as client:
        stream = await client.submit(request("a", 10**6))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        whole = await read(stream)
        assert whole["a"].finish_reason is FinishReason.ERROR and "no progress for 1 s" in str(whole["a"].error)
        assert client.state is EngineState.DEAD


async def test_an_engine_that_turns_without_getting_on_is_stalled() -> None:
    async with running(service=ServiceSettings(stall_timeout=0.5), idle_at=3) as client:
        await client.submit(request("a", 10**6))
        await until_state(client, EngineState.STALLED, 2.0)
        await until_state(client, EngineState.DEAD)


async def test_an_idle_engine_is_probed() -> None:
    service = ServiceSettings(probe_interval=0.2, stall_timeout=0.8)
    async with running(service=service) as client:
        await asyncio.sleep(1.0)
        assert 1 <= client.stats().passes <= 5
        assert client.state is EngineState.READY and not ends(client).counts


async def test_an_engine_whose_probe_fails_is_not_ready() -> None:
    service = ServiceSettings(probe_interval=0.2, stall_timeout=0.8)
    async with running(service=service, error_for="probe", error_at=0) as client:
        await until_state(client, EngineState.STALLED)
        await asyncio.sleep(0.5)
        # It answers, and it is not killed; still nobody should send requests there.
        assert client.state is EngineState.STALLED and "cannot complete a pass" in client.reason


async def test_a_lost_engine_is_replaced_if_the_policy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastblt.server.process.supervisor.RESTART_PAUSE_SECONDS", 0.01)
    async with running(service=ServiceSettings(on_engine_failure=FailurePolicy.RESTART)) as client:
        for restarts in range(4):
            assert client.restarts == restarts
            assert (await read(await client.submit(request("a"))))["a"].finish_reason is FinishReason.LENGTH
            stream = await client.submit(request("b", 10**6))
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            assert (await read(stream))["b"].finish_reason is FinishReason.ERROR
            if restarts == 3:
                break
            assert client.state is EngineState.LOADING and "SIGKILL" in client.reason
            await client.ready()
            ends(client).counts.clear()
        # Enough is enough.
        assert client.state is EngineState.DEAD


async def test_a_replacement_that_dies_while_it_loads_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where memory is short, the next engine is as likely to be killed as the last."""
    monkeypatch.setattr("fastblt.server.process.supervisor.RESTART_PAUSE_SECONDS", 0.01)
    gate = tmp_path / "gate"
    gate.touch()
    async with running(service=ServiceSettings(on_engine_failure=FailurePolicy.RESTART), gate=str(gate)) as client:
        await client.ready()
        gate.unlink()
        for _ in range(2):
            lost = client.pid
            assert lost is not None
            os.kill(lost, signal.SIGKILL)
            async with asyncio.timeout(10):
                while client.pid in (lost, None):
                    await asyncio.sleep(0.01)
            assert client.state is EngineState.LOADING
        gate.touch()
        await client.ready()
        assert (await read(await client.submit(request("a"))))["a"].finish_reason is FinishReason.LENGTH


async def test_an_engine_whose_end_cannot_be_told_does_not_hold_up_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fault(self: EngineProcess) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(EngineProcess, "_status", fault)
    client = client_of()
    async with asyncio.timeout(10):
        await client.start()
        await client.ready()
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until_state(client, EngineState.DEAD)
        await client.stop()


async def test_requests_that_wait_too_long_are_ended() -> None:
    async with running(service=ServiceSettings(queue_timeout=0.3), pause=0.01, max_running=1) as client:
        first = await client.submit(request("first", 10**6))
        second = await client.submit(request("second", 10**6))
        whole = await read(second)
        assert whole["second"].error_code is ErrorCode.QUEUE_TIMEOUT and not whole["second"].ids
        # Who has had a turn has no more to fear from it.
        await asyncio.sleep(0.3)
        assert "first" in client._live
        first.close()


async def test_requests_that_take_too_long_are_ended() -> None:
    async with running(service=ServiceSettings(request_timeout=0.3), pause=0.01) as client:
        whole = await read(await client.submit(request("a", 10**6)))
        assert whole["a"].error_code is ErrorCode.REQUEST_TIMEOUT and whole["a"].ids
        assert (await read(await client.submit(request("b", 3))))["b"].finish_reason is FinishReason.LENGTH


async def test_deadlines_hold_when_the_engine_does_not_answer() -> None:
    async with running(service=ServiceSettings(request_timeout=0.3), pause=0.01) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        async with asyncio.timeout(1.0):
            whole = await read(await client.submit(request("a", 10**6)))
        assert whole["a"].error_code is ErrorCode.REQUEST_TIMEOUT
        os.kill(client.pid, signal.SIGCONT)
