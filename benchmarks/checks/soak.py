"""Overloads a server for a while, and checks that nothing slows down, leaks, hangs or is lost.

    python -m fastblt.benchmarks.checks.soak                ten minutes; the exit status is 0 if every criterion holds
    python -m fastblt.benchmarks.checks.soak --seconds 60   a shorter one

There are more clients than the server has room for. They use every method, greedy and sampled, streamed and whole,
with logprobs, several choices, many stop strings and grammars, dear ones too. Some disconnect midway, some send
invalid requests, and after a 429 they pause and retry. Clients check that each choice ends exactly once. Server,
engine and clients share this machine and use only its loopback interface.

Criteria: the bytes per second of the last fifth are within 10 % of those of the first fifth after the warm-up. The
private memory of neither process grows by more than 16 MiB in the second half. When the
clients are gone, nothing is running or waiting, and every page is free or cached. The metric counted the 429s that were
sent. There was no 5xx. Every answer that was read ended exactly once.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.serving import Server, serving
from fastblt.benchmarks.prompts import library_text
from fastblt.server.settings import PRETRAINED

METHODS = ("blt", "blt-s", "blt-d", "blt-dv", "blt-dsv", "auto")

#: Invalid bodies, with the status that each gets.
BAD: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[" * 20_000, 400),
    (b'{"max_tokens": 5}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400),
    (b'{"prompt": "a", "temperature": 1e400}', 400),
    (b'{"prompt": "a", "decoding": {"method": "magic"}}', 400),
    (b'{"prompt": "a", "n": 100000}', 400),
    (b'{"prompt": [2], "max_tokens": 5}', 400),
    (b'{"prompt": "a", "model": "another"}', 404),
    (b'{"prompt": "' + b"x" * 100_000 + b'"}', 400),
]

#: Stops that hold back much and hardly ever match.
MANY_STOPS = ["a" * length + "!" for length in range(960, 1024)]

#: Honest grammars, one that spends its budget, and one that takes a byte a time.
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[a-z]{1,40}"},
    {"choice": [f"choice number {i}" for i in range(500)]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 20}}}},
    {"grammar": 'start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/'},
    {"grammar": 'start: t ("+" t)*\nt: /[0-9]/'},
]

#: How a request ends whose grammar spends its budget, or for whose first character there is no room.
GRAMMAR_CODES = (b"grammar_too_complex", b"nothing_left")

#: Classes of prompts by their bytes, for the first byte.
PROMPT_CLASSES = (20, 300, 4000)

SAMPLE_SECONDS = 2.0
WARM_UP = 0.1
MEMORY_BYTES = 16 * 2**20
THROUGHPUT_SHARE = 0.10


@dataclass
class Tally:
    """What the clients saw. `ends` counts the finish reasons of clients that stayed, `left` those that did not."""

    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    #: Seconds to the first byte of streams, by the largest prompt of a class.
    firsts: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in PROMPT_CLASSES})


@dataclass
class Sample:
    """State of the server `seconds` after the start: `bytes` generated, private memory (bytes), requests running and
    waiting, the engine's processor time (seconds).
    """

    seconds: float
    bytes: float
    server_memory: int
    engine_memory: int
    running: float
    waiting: float
    engine_cpu: float


def sample(server: Server, seconds: float) -> Sample:
    """Read the current metrics and memory of the server and its engine."""
    values, pid = server.metrics(), server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    # The other one tries grammars before they are taken.
    [engine] = [child for child in children if b"engine_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return Sample(
        seconds,
        values["fastblt_generation_tokens_total"],
        private_memory(pid),
        private_memory(int(engine)),
        values["fastblt_num_requests_running"],
        values["fastblt_num_requests_waiting"],
        values["fastblt_engine_process_cpu_seconds_total"],
    )


def private_memory(pid: int) -> int:
    """Bytes of memory that a process does not share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"Private_\w+:\s+(\d+) kB", text)) * 1024


class Client:
    """Sends requests until the monotonic time `until`. They are random, by the client's seed."""

    def __init__(self, session: aiohttp.ClientSession, seed: int, text: str, tally: Tally, until: float) -> None:
        self._session = session
        self._rng = random.Random(seed)
        self._text = text
        self._tally = tally
        self._until = until
        #: When the first bytes of the last answer came.
        self._first = 0.0

    async def run(self) -> None:
        while time.monotonic() < self._until:
            kind = self._rng.random()
            if kind < 0.1:
                body, expected = self._rng.choice(BAD)
                status, _, _ = await self._ask(body)
                self._tally.statuses[status] += 1
                if status not in (expected, 429):
                    self._tally.wrong.append(f"{status} for {body[:60]!r}")
            elif kind < 0.25:
                await self._leave(self._body())
            else:
                await self._stay(self._body())

    def _body(self) -> dict[str, Any]:
        rng = self._rng
        start = rng.randrange(len(self._text) - 4000)
        body: dict[str, Any] = {
            "prompt": self._text[start : start + rng.choice((20, 100, 300, 1500))],
            "max_tokens": rng.choice((1, 16, 64, 200)),
            "temperature": rng.choice((0.0, 0.7, 1.0)),
            "stream": rng.random() < 0.6,
            "decoding": {"method": rng.choice(METHODS)},
        }
        if rng.random() < 0.2:
            body["logprobs"] = rng.choice((0, 5))
        if rng.random() < 0.2:
            body["n"] = 2
        if rng.random() < 0.2:
            body["stop"] = ["\n\n", "return"]
        elif rng.random() < 0.05:
            body["stop"] = MANY_STOPS
        if rng.random() < 0.1:
            body["structured_outputs"] = rng.choice(GRAMMARS)
            body["decoding"] = {"method": rng.choice(("blt", "blt-s", "blt-dv", "blt-dsv", "auto"))}
        if rng.random() < 0.03:
            # As long as this server takes.
            body |= {"prompt": self._text[start : start + 3800], "max_tokens": 1, "logprobs": 20}
        if rng.random() < 0.2:
            body["seed"] = rng.randrange(2**31)
        return body

    async def _stay(self, body: dict[str, Any]) -> None:
        began = time.monotonic()
        status, kind, content = await self._ask(json.dumps(body).encode())
        self._tally.statuses[status] += 1
        if status == 200 and body["stream"]:
            size = next(size for size in PROMPT_CLASSES if len(body["prompt"]) <= size)
            self._tally.firsts[size].append(self._first - began)
        if status == 429:
            # Retry-After is one second.
            await asyncio.sleep(self._rng.uniform(0.5, 1.0))
        elif status == 200:
            reasons = _reasons(kind, content)
            if len(reasons) == body.get("n", 1):
                self._tally.ends.update(reasons)
            else:
                self._tally.wrong.append(f"{len(reasons)} ends for {body.get('n', 1)} choices: {content[-200:]!r}")
        elif status == 400 and "structured_outputs" in body and any(code in content for code in GRAMMAR_CODES):
            self._tally.ends["refused grammar"] += 1
        else:
            self._tally.wrong.append(f"{status}: {content[:200]!r}")

    async def _leave(self, body: dict[str, Any]) -> None:
        """Send a request, and close the connection after a moment."""
        status = None
        with suppress(TimeoutError, aiohttp.ClientError):
            async with (
                asyncio.timeout(self._rng.uniform(0.2, 1.5)),
                self._session.post("/v1/completions", json=body) as answer,
            ):
                status = answer.status
                await answer.read()
        if status is not None:
            self._tally.statuses[status] += 1
        else:
            # The server may have refused it at that moment, unread.
            self._tally.left += 1

    async def _ask(self, body: bytes) -> tuple[int, str, bytes]:
        """Send one request. Returns status, content type and content of the answer."""
        headers = {"content-type": "application/json"}
        async with self._session.post("/v1/completions", data=body, headers=headers) as answer:
            first = await answer.content.readany()
            self._first = time.monotonic()
            return answer.status, answer.content_type, first + await answer.read()


async def load(server: Server, seconds: float, clients: int) -> tuple[Tally, list[Sample]]:
    """Run all clients for `seconds`, sampling the server meanwhile."""
    start = time.monotonic()
    tally, samples = Tally(), []
    text = library_text().decode("utf-8", "replace")
    # Every request opens a new connection, as separate clients would.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        asking = [Client(session, seed, text, tally, start + seconds).run() for seed in range(clients)]
        work = asyncio.gather(*asking)
        while not work.done():
            samples.append(await asyncio.to_thread(sample, server, time.monotonic() - start))
            await asyncio.sleep(SAMPLE_SECONDS)
        await work
    return tally, [one for one in samples if one.seconds <= seconds]


def judge(tally: Tally, samples: list[Sample], final: dict[str, float]) -> dict[str, Any]:
    """The report: figures, and whether each criterion holds."""
    seconds = samples[-1].seconds
    warm = [sample for sample in samples if sample.seconds >= WARM_UP * seconds]
    fifth = max(len(warm) // 5, 2)
    first, last = warm[:fifth], warm[-fifth:]
    # Cache memory grows until every page has been used once, so growth is measured from the middle.
    middle = warm[2 * fifth : 3 * fifth] or first
    before, after = _rate(first), _rate(last)
    memory = {}
    for process in ("server_memory", "engine_memory"):
        early, half, late = (
            statistics.median(getattr(sample, process) for sample in part) for part in (first, middle, last)
        )
        memory[process] = {"first_mib": early / 2**20, "middle_mib": half / 2**20, "last_mib": late / 2**20}
        memory[process]["flat"] = late - half <= MEMORY_BYTES
    causes = [f'fastblt_requests_rejected_total{{cause="{cause}"}}' for cause in ("queue_full", "bodies_full")]
    counted = sum(final.get(cause, 0.0) for cause in causes)
    refused = sum(
        count
        for name, count in final.items()
        if name.startswith("fastblt_http_requests_total{") and 'status="429"' in name
    )
    criteria = {
        "throughput": abs(after / before - 1.0) <= THROUGHPUT_SHARE,
        "memory": all(process["flat"] for process in memory.values()),
        "nothing stuck": final["fastblt_num_requests_running"] == final["fastblt_num_requests_waiting"] == 0,
        "pages balance": _balanced(final),
        # Some clients that left had been refused, without reading it.
        "429s counted": counted == refused and 0 <= counted - tally.statuses[429] <= tally.left,
        "overload": tally.statuses[429] > 0,
        "no 5xx": not any(status >= 500 for status in tally.statuses),
        "one end each": not tally.wrong,
    }
    return {
        "seconds": seconds,
        "bytes_per_second": {"first_fifth": before, "last_fifth": after, "ratio": after / before},
        # This hardly depends on other jobs on the machine.
        "bytes_per_engine_cpu_second": {
            "first_fifth": before / _busy(first),
            "last_fifth": after / _busy(last),
            "ratio": after / before * _busy(first) / _busy(last),
        },
        "memory": memory,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "left_unread": tally.left,
        "first_byte_p99_s": {
            str(size): sorted(found)[int(0.99 * len(found))] for size, found in tally.firsts.items() if found
        },
        "429s": {"seen_by_clients": tally.statuses[429], "metric": counted},
        "ends": dict(tally.ends),
        "ended": {name: count for name, count in final.items() if name.startswith("fastblt_request_success_total")},
        "preemptions": final["fastblt_num_preemptions_total"],
        "memory_mib": [
            [round(s.seconds), s.server_memory >> 20, s.engine_memory >> 20]
            for s in samples[:: max(len(samples) // 20, 1)]
        ],
        "mean_running": statistics.mean(sample.running for sample in warm),
        "mean_waiting": statistics.mean(sample.waiting for sample in warm),
        "wrong": tally.wrong[:20],
        "criteria": criteria,
        "passed": all(criteria.values()),
    }


def settle(server: Server) -> dict[str, float]:
    """Wait until nothing runs any more, or half a minute. Returns the metrics."""
    deadline = time.monotonic() + 30
    while json.loads(server.get("/load"))["server_load"] and time.monotonic() < deadline:
        time.sleep(0.1)
    # An idle engine reports its counters once a second.
    time.sleep(2)
    return server.metrics()


def _rate(samples: list[Sample]) -> float:
    return (samples[-1].bytes - samples[0].bytes) / (samples[-1].seconds - samples[0].seconds)


def _busy(samples: list[Sample]) -> float:
    """The mean number of processors that the engine used."""
    return (samples[-1].engine_cpu - samples[0].engine_cpu) / (samples[-1].seconds - samples[0].seconds)


def _balanced(final: dict[str, float]) -> bool:
    groups = [name for name in final if name.startswith("fastblt_cache_pages{")]
    free = {name: final[name.replace("pages{", "pages_free{")] for name in groups}
    cached = {name: final.get(name.replace("pages{", "pages_cached{"), 0.0) for name in groups}
    return bool(groups) and all(free[name] + cached[name] == final[name] for name in groups)


def _reasons(kind: str, content: bytes) -> list[str]:
    """The finish reasons of an answer's choices; empty if the answer is not complete."""
    if kind == "application/json":
        return [choice["finish_reason"] for choice in json.loads(content)["choices"]]
    if not content.endswith(b"\n\ndata: [DONE]\n\n"):
        return []
    events = [json.loads(line[6:]) for line in content.split(b"\n\n") if line and line != b"data: [DONE]"]
    choices = [choice for event in events for choice in event.get("choices", ())]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]] + ["error"] * sum(
        "error" in event for event in events
    )


def check(
    *,
    model: str = str(PRETRAINED),
    seconds: float = 600.0,
    clients: int = 64,
    max_running: int = 16,
    max_waiting: int = 16,
) -> dict[str, Any]:
    """Load a server for `seconds`, then check the criteria."""
    options = ["--max-running", str(max_running), "--max-waiting", str(max_waiting), "--cache-size", "48MiB"]
    with serving(model, [*options, "--max-model-len", "4096", "--log-level", "warning"]) as server:
        tally, samples = asyncio.run(load(server, seconds, clients))
        report = judge(tally, samples, settle(server))
        report["log"] = server.log.read_text()[-2000:]
    print(json.dumps(report, indent=1))
    return report


app = command(check)

if __name__ == "__main__":
    app()
