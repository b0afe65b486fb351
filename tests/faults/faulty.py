"""A real server process with an engine process that has faults, and clients that read to the letter."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.faults.injected import POISON, VARIABLE
from tests.server.api.running import until

SMALL = ["--cache-size", "64MiB", "--max-model-len", "4096", "--threads", "1", "--max-running", "16"]
#: Nothing that a request of these tests draws by chance is NaN.
SAFE = {"ignore_eos": True, "logit_bias": {str(ord(POISON) + 4): -100}}


@dataclass
class Outcome:
    """What one client saw. `ends` counts the terminal events; there must be one."""

    status: int = 0
    text: str = ""
    ends: int = 0
    finish: str | None = None
    code: str | None = None
    done: bool = False
    headers: httpx.Headers = field(default_factory=httpx.Headers)


class Server:
    def __init__(self, process: subprocess.Popen[bytes], log: Path | None, port: int) -> None:
        self.process = process
        self.port = port
        self._log = log
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=False)

    @property
    def engine(self) -> int:
        """The engine process's id."""
        pid = self.process.pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace") if self._log is not None else ""

    def status(self, path: str = "/ready") -> int:
        return self.http.get(path).status_code

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}

    def ended(self) -> dict[str, float]:
        """How many requests ended in which way."""
        found = {}
        for name, value in self.metrics().items():
            if match := re.fullmatch(r'fastblt_request_success_total\{finished_reason="(\w+)"\}', name):
                found[match[1]] = value
        return found

    def assert_sound(self) -> None:
        """Nothing is left of any request, and the engine is of use."""
        until(lambda: self.http.get("/load").json() == {"server_load": 0})
        until(self._all_free)
        answer = self.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3, **SAFE})
        assert answer.status_code == 200, answer.text
        assert "not all of its memory is free" not in self.log()

    def _all_free(self) -> bool:
        values = self.metrics()
        groups = [name for name in values if name.startswith("fastblt_cache_pages{")]
        assert len(groups) >= 4
        free = {group: values[group.replace("pages{", "pages_free{")] for group in groups}
        cached = {group: values.get(group.replace("pages{", "pages_cached{"), 0.0) for group in groups}
        return all(free[group] + cached[group] == values[group] for group in groups)

    def memory(self) -> int:
        """Bytes that the two processes have for themselves."""
        return sum(private_bytes(pid) for pid in (self.process.pid, self.engine))


@contextmanager
def serving(
    checkpoint: str, folder: Path, *args: str, stderr: str | None = None, files: int | None = None, **faults: Any
) -> Iterator[Server]:
    """A server that is ready. `stderr` is a file for its log, else it is in `folder`; `files` may be open at once."""
    log = folder / "log"
    limit = ["prlimit", f"--nofile={files}"] if files is not None else []
    command = [*limit, sys.executable, "-m", "tests.faults.injected", "serve", checkpoint, *SMALL, *args]
    env = {**os.environ, VARIABLE: json.dumps(faults), "OMP_NUM_THREADS": "1"}
    port = _free_port()
    with open(stderr or log, "w") as output:
        process = subprocess.Popen([*command, "--port", str(port)], env=env, stdout=output, stderr=output)
    server = Server(process, None if stderr else log, port)
    try:
        until(lambda: _ready(server) or process.poll() is not None, 60)
        assert process.poll() is None, server.log()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


async def ask(server: Server, **body: Any) -> Outcome:
    """One completion; streamed if the body says so."""
    async with httpx.AsyncClient(base_url=server.url, timeout=90, verify=False) as client:
        outcome = Outcome()
        async with client.stream("POST", "/v1/completions", json={"max_tokens": 20, **SAFE, **body}) as response:
            outcome.status, outcome.headers = response.status_code, response.headers
            if response.headers["content-type"].startswith("text/event-stream"):
                async for data in _events(response):
                    _take(outcome, data)
            else:
                answer = json.loads(await response.aread())
                _take(outcome, answer)
                outcome.done = True
        return outcome


def run(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of coroutines that run together; exceptions are raised."""

    async def together() -> list[Any]:
        return await asyncio.gather(*work)

    return asyncio.run(together())


def assert_one_end(outcomes: list[Outcome]) -> Counter[str | None]:
    """Every client was told once how it ended. How often they ended in which way."""
    for outcome in outcomes:
        assert outcome.ends == 1 and outcome.done, outcome
    return Counter(outcome.code or outcome.finish for outcome in outcomes)


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        assert not line or line.startswith("data: "), line
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def _take(outcome: Outcome, data: Any) -> None:
    assert not outcome.done, "news after the end"
    if data == "[DONE]":
        outcome.done = True
    elif "error" in data:
        outcome.ends += 1
        outcome.code = data["error"]["code"]
        assert "secret" not in json.dumps(data)
    else:
        for choice in data["choices"]:
            assert outcome.ends == 0, "text after the end"
            outcome.text += choice["text"]
            if choice["finish_reason"]:
                outcome.ends += 1
                outcome.finish = choice["finish_reason"]


def _ready(server: Server) -> bool:
    try:
        return server.status() == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def private_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"Private_\w+:\s+(\d+) kB", text)) * 1024
