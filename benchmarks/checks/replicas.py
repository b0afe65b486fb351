"""Ray Serve replicas under load: the throughput of one and of two, and the effect of a killed replica.

    python -m fastblt.benchmarks.checks.replicas                  all phases: one, two, killed, upgraded, growing
    python -m fastblt.benchmarks.checks.replicas --phases killed  one of them

It starts its own Ray on this machine and needs the extras `bench` and `ray`. In each phase 16 clients stream 200
requests: from one replica; from two; from two of which one is killed (SIGKILL, with its engine) when half of the
requests have ended; from two that are upgraded at that time; from one that may scale to two.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from fastblt.benchmarks.command import command
from fastblt.deploy.ray.app import Options, build
from fastblt.server.child_process import child_environment


@dataclass
class Outcome:
    """How a request ended: `complete`, or an error code. `first` (byte) and `whole` (answer) are seconds."""

    end: str
    bytes: int = 0
    first: float = 0.0
    whole: float = 0.0
    replica: str = ""
    status: int = 0
    retryable: bool = False


@dataclass
class Load:
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> dict[str, object]:
        done = [o for o in self.outcomes if o.end == "complete"]
        firsts = sorted(o.first for o in done)
        return {
            "requests": len(self.outcomes),
            "ends": dict(Counter(o.end for o in self.outcomes)),
            "not retryable": sum(not o.retryable for o in self.outcomes if o.end != "complete"),
            "by replica": sorted(Counter(o.replica for o in done).values()),
            "seconds": round(self.seconds, 2),
            "bytes a second": round(sum(o.bytes for o in self.outcomes) / self.seconds),
            "median first byte, ms": round(1000 * firsts[len(firsts) // 2]) if firsts else None,
        }


@contextmanager
def serving(options: Options, cpus: float) -> Iterator[str]:
    """Start Ray for this process and deploy the application. Yields its URL once all replicas are healthy."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": child_environment()["PYTHONPATH"],
    }
    ray.init(
        address="local",
        num_cpus=int(cpus),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        runtime_env={"env_vars": environment},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(options)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(options: Options) -> None:
    """Start the application, or replace it. Returns when it is healthy."""
    serve.run(build(options), name="fastblt", route_prefix="/")


def replica_pids() -> set[int]:
    """The process ids of our replicas on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::ServeReplica:fastblt:Replica"):
                found.add(int(path.parent.name))
        except OSError:
            continue  # The process has just ended.
    return found


async def ask(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Outcome:
    """Send one streamed request and read its answer to the end."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    outcome = Outcome("no end")
    try:
        async with client.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as response:
            outcome.status, outcome.replica = response.status_code, response.headers.get("x-replica", "")
            if response.status_code != 200:
                return _failed(outcome, json.loads(await response.aread()), response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    outcome.end = "complete" if outcome.end == "no end" else outcome.end
                elif line.startswith("data: "):
                    _take(outcome, json.loads(line.removeprefix("data: ")), time.monotonic() - began)
    except httpx.HTTPError as error:
        outcome.end = type(error).__name__
    outcome.whole = time.monotonic() - began
    if outcome.end == "complete":
        assert outcome.bytes == max_tokens, outcome
    return outcome


async def load(url: str, count: int, clients: int, max_tokens: int, half: Callable[[], None] | None = None) -> Load:
    """Send `count` requests from `clients` clients. `half` is called when half of them have ended."""
    rng = random.Random(0)
    prompts = [f"# {rng.random()}\ndef function_{number}(a, b):\n" for number in range(count)]
    result = Load()
    waiting = iter(prompts)
    began = time.monotonic()

    async def visit(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            result.outcomes.append(await ask(client, prompt, max_tokens))
            if half is not None and len(result.outcomes) == count // 2:
                half()

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(visit(client) for _ in range(clients)))
    result.seconds = time.monotonic() - began
    return result


class Kill:
    """Kills one replica when called; with `engine`, only the replica's engine."""

    def __init__(self, *, engine: bool = False) -> None:
        self._engine = engine

    def __call__(self) -> None:
        self.victim = min(replica_pids())
        os.kill(_children(self.victim)[0] if self._engine else self.victim, signal.SIGKILL)
        self._at = time.monotonic()

    def await_return(self, count: int, seconds: float = 120.0) -> float:
        """Seconds from the kill until Ray has `count` healthy replicas again."""
        while True:
            states = serve.status().applications["fastblt"].deployments["Replica"].replica_states
            pids = replica_pids()
            if dict(states) == {"RUNNING": count} and self.victim not in pids and len(pids) == count:
                return time.monotonic() - self._at
            assert time.monotonic() - self._at < seconds, f"no {count} replicas in {seconds:g} s: {states}"
            time.sleep(0.25)


class Upgrade:
    """Deploys the application with other options when called. Ray then replaces the replicas one by one."""

    def __init__(self, options: Options) -> None:
        self._thread = threading.Thread(target=deploy, args=[options])

    def __call__(self) -> None:
        self.before = replica_pids()
        self._thread.start()

    def finish(self) -> int:
        """Wait for the upgrade. Returns how many of the old replicas are left, which should be 0."""
        self._thread.join()
        return len(self.before & replica_pids())


PHASES = ("one", "two", "killed", "upgraded", "growing")


def check(
    *,
    requests: int = 200,
    clients: int = 16,
    max_tokens: int = 128,
    model: str | None = None,
    phases: Sequence[str] = PHASES,
) -> dict[str, Any]:
    """Run the load in each of `phases`, with the shipped checkpoint or another `model`."""
    engine = {"cache_bytes": 256 << 20, "max_running": 16, "threads": 1}
    options = Options(replicas=1, model=model, engine=engine)
    result: dict[str, Any] = {}

    def measure(what: str, url: str, half: Callable[[], None] | None = None) -> None:
        result[what] = asyncio.run(load(url, requests, clients, max_tokens, half)).report()
        print(f"{what}: {json.dumps(result[what])}", flush=True)

    if "one" in phases:
        with serving(options, cpus=2) as url:
            asyncio.run(load(url, 8, 8, 16))  # A warm-up, so that compilation is not timed.
            measure("1 replica", url)
    if {"two", "killed", "upgraded"} & set(phases):
        with serving(options.model_copy(update={"replicas": 2}), cpus=2) as url:
            asyncio.run(load(url, 16, 8, 16))
            if "two" in phases:
                measure("2 replicas", url)
            if "killed" in phases:
                killed = Kill()
                measure("2 replicas, 1 killed", url, killed)
                print(f"2 healthy replicas again {killed.await_return(2):.1f} s after the kill", flush=True)
            if "upgraded" in phases:
                changed = {"replicas": 2, "engine": engine | {"max_running": 12}}
                upgrade = Upgrade(options.model_copy(update=changed))
                measure("2 replicas, upgraded meanwhile", url, upgrade)
                print(f"{upgrade.finish()} of the replicas before the upgrade are left", flush=True)
    if "growing" in phases:
        bounds = {"max_replicas": 2, "target_requests": 4.0, "upscale_delay": 2.0, "downscale_delay": 5.0}
        with serving(options.model_copy(update=bounds), cpus=2) as url:
            measure("1 replica that may become 2", url)
            print(f"{len(replica_pids())} replicas at its end", flush=True)
            began = time.monotonic()
            while len(replica_pids()) > 1 and time.monotonic() - began < 120:
                time.sleep(0.5)
            print(f"{len(replica_pids())} replica {time.monotonic() - began:.1f} s later", flush=True)
    return result


def _children(pid: int) -> list[int]:
    return [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()]


def _failed(outcome: Outcome, body: dict[str, dict[str, str]], response: httpx.Response) -> Outcome:
    outcome.end = body["error"]["code"]
    outcome.retryable = response.status_code in (429, 503) and "retry-after" in response.headers
    return outcome


def _take(outcome: Outcome, event: dict[str, Any], since: float) -> None:
    if isinstance(error := event.get("error"), dict):
        outcome.end = error["code"]
        outcome.retryable = error["code"] == "replica_lost" and "send it again" in error["message"]
        return
    for choice in event.get("choices") or []:
        ids = choice.get("token_ids") or []
        if ids and not outcome.bytes:
            outcome.first = since
        outcome.bytes += len(ids)


app = command(check)

if __name__ == "__main__":
    app()
