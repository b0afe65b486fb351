"""Anything at all over raw connections: no answer is a 500, everybody else is served, and nothing is left behind.

FASTBLT_FUZZ_SECONDS makes it longer (`make fuzz`); then it is strict about time and memory too.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.faulty import Server, serving
from tests.fuzz.conversations import Conversation, conversations

SECONDS = float(os.environ.get("FASTBLT_FUZZ_SECONDS", "0"))

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


@pytest.fixture(scope="module")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(checkpoint, Path(tmp_path_factory.mktemp("fuzz")), "--shutdown-timeout", "1") as server:
        yield server


class Watch:
    """Asks /health again and again; `longest` is what it waited at most, in seconds."""

    def __init__(self, server: Server) -> None:
        self.longest = 0.0
        self.waits: list[float] = []
        self._url = server.url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as http:
            while not self._over.wait(0.01):
                start = time.monotonic()
                assert http.get("/health").status_code == 200
                self.waits.append(time.monotonic() - start)
                self.longest = max(self.longest, self.waits[-1])


def check(answer: bytes, seen: Counter[int]) -> None:
    """Every answer that came as a whole is one of HTTP's, and every error is an error object."""
    place = 0
    while (head := _HEAD.match(answer, place)) is not None:
        status = int(head[1])
        seen[status] += 1
        assert status != 500, answer[place : place + 500]
        length = re.search(rb"(?i)content-length: (\d+)", head[2])
        if length is None:
            break  # Events, or what goes on after 100.
        body = answer[head.end() : head.end() + int(length[1])]
        # HEAD announces a body that does not come.
        if status >= 400 and len(body) == int(length[1]) and not body.startswith(b"HTTP/"):
            assert b"content-type: application/json" in head[2], head[2]
            assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
        place = head.end() + int(length[1])


def test_anything_over_raw_connections(server: Server) -> None:
    seen: Counter[int] = Counter()
    pool = ThreadPoolExecutor(6)

    @settings(
        max_examples=20 if not SECONDS else 300,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(conversations(), min_size=1, max_size=6))
    def talk(several: list[Conversation]) -> None:
        for answer in pool.map(lambda one: one.hold(server.port), several):
            check(answer, seen)

    talk()
    before, began = server.memory(), time.monotonic()
    with Watch(server) as watch:
        while time.monotonic() - began < max(SECONDS, 5):
            talk()
    server.assert_sound()
    log = server.log()
    waits = sorted(watch.waits)
    grown = server.memory() - before
    slowest = ", ".join(f"{1000 * waits[int((len(waits) - 1) * part)]:.0f}" for part in (0.5, 0.999, 1))
    print(f"answers: {dict(sorted(seen.items()))}; /health, {len(waits)} times: median, 99.9 % and most {slowest} ms")
    print(f"memory: {grown / 2**20:+.1f} MiB")
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    assert seen[200] and seen[400]
    assert grown < 30 * 2**20
    # A machine that others use too stops everybody from time to time.
    assert watch.longest < (0.5 if SECONDS else 5)
