"""Large bodies of every kind, from six clients at once: nobody else waits for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest

from fastblt.server.api.body import parse_body
from fastblt.server.api.errors import ApiError
from fastblt.server.api.schemas import CompletionRequest
from fastblt.server.request import InvalidRequestError
from tests.faults.faulty import Server, serving
from tests.fuzz.bodies import large_bodies
from tests.fuzz.test_http import SECONDS
from tests.fuzz.watch import Watch

LENGTH = 32768
BODIES = {name: (path, body) for name, path, body in large_bodies(LENGTH)}


@pytest.fixture(scope="module")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = Path(tmp_path_factory.mktemp("loop"))
    with serving(checkpoint, folder, "--max-model-len", str(LENGTH), "--cache-size", "512MiB") as server:
        yield server


@pytest.mark.parametrize("name", [name for name, (path, _) in BODIES.items() if path == "/v1/completions"])
def test_a_body_costs_little(name: str) -> None:
    """No body costs more than three times what Python takes for the JSON of all ids that one call may have.

    Processor time, the least of three, since others use the machine too. Far less than all of it is spent without a
    turn for others.
    """

    def parse() -> None:
        with suppress(ApiError, InvalidRequestError):
            body, _ = parse_body(BODIES[name][1], CompletionRequest, "prompt", LENGTH)
            body.take_prompts(LENGTH)

    ids = BODIES["whole prompts as ids"][1]
    turns = [(_seconds(parse), _seconds(lambda: json.loads(ids))) for _ in range(3)]
    assert min(ours for ours, _ in turns) < 3 * min(python for _, python in turns)


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


# The engine takes half a minute for those of prompts.
@pytest.mark.parametrize("name", [name for name in BODIES if SECONDS or "logprobs" not in name])
def test_health_does_not_wait(server: Server, name: str) -> None:
    path, body = BODIES[name]
    statuses: list[int] = []
    errors: list[OSError] = []
    end = time.monotonic() + (5 if SECONDS else 0.5)

    def send() -> None:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=200)
        try:
            while not statuses or time.monotonic() < end:
                connection.request("POST", path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                statuses.append(answer.status)
        except OSError as error:
            errors.append(error)
        connection.close()

    with Watch(server.port) as watch:
        threads = [Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and set(statuses) <= {200, 400, 429}, (errors, statuses)
    print(f"{name}: {len(statuses)} answers; {watch}")
    assert watch.longest < (0.2 if SECONDS else 1) + 2 * watch.noise
