"""What is done about an engine that hangs, fails its probe, or is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fastblt.server.process.client import EngineClient, EngineState, EngineUnavailableError
from fastblt.server.process.engine_process import EngineProcess
from fastblt.server.request import (
    FinishReason,
)
from fastblt.server.settings import FailurePolicy, ServiceSettings
from tests.server.process.harness import client_of, ends, read, request, running


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
