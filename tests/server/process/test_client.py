"""The engine process and its client, with an engine that can be made to fail."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fastblt.server.process.client import EngineClient, EngineState, EngineUnavailableError
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import (
    ErrorCode,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
)
from fastblt.server.settings import EngineSettings, ServiceSettings
from tests.server.api.fake_engine import REPEATED
from tests.server.process.harness import client_of, read, request, running


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
