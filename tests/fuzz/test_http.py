"""Anything at all over raw connections: no answer is a 500, everybody else is served, and nothing is left behind.

FASTBLT_FUZZ_SECONDS makes it longer (`make fuzz`); then it is strict about time and memory too.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.faulty import Server, serving
from tests.fuzz.conversations import Conversation, conversations
from tests.fuzz.watch import Watch

SECONDS = float(os.environ.get("FASTBLT_FUZZ_SECONDS", "0"))

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


@pytest.fixture(scope="module")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(checkpoint, Path(tmp_path_factory.mktemp("fuzz")), "--shutdown-timeout", "1") as server:
        yield server


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


@pytest.mark.timeout(SECONDS + 600)
def test_anything_over_raw_connections(server: Server) -> None:
    seen: Counter[int] = Counter()
    pool = ThreadPoolExecutor(6)

    @settings(
        max_examples=100 if SECONDS else 20,
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
    with Watch(server.port) as watch:
        while time.monotonic() - began < max(SECONDS, 5):
            talk()
    server.assert_sound()
    log = server.log()
    grown = server.memory() - before
    print(f"answers: {dict(sorted(seen.items()))}; {watch}")
    print(f"memory: {grown / 2**20:+.1f} MiB")
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    assert seen[200] and seen[400]
    assert grown < 30 * 2**20
    assert watch.longest < (0.5 if SECONDS else 3) + 2 * watch.noise
