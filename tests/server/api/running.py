"""A real server on a loopback port, in a thread, around a tiny random model or any other engine."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from fastblt.models.checkpoint import save_checkpoint
from fastblt.server.api.serve import _Server, configure, listen
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings, HttpSettings
from tests.tiny import tiny_model

MODEL = "tiny"
MAX_MODEL_LEN = 4096


def save_tiny(folder: Path) -> str:
    """A tiny checkpoint with a diffusion head, as a settings' model."""
    save_checkpoint(tiny_model(3, block_sizes=(4, 8)), folder)
    return str(folder)


def tiny_settings(model: str, **more: Any) -> EngineSettings:
    """Without a prefix cache: what a request costs depends on no test before it."""
    return EngineSettings(
        **{
            "model": model,
            "cache_bytes": 2**26,
            "max_model_len": MAX_MODEL_LEN,
            "threads": 1,
            "max_running": 16,
            "prefix_cache": False,
            **more,
        }
    )


class RunningServer:
    """Serves `client` while its context lasts. `wait` is for the engine to be loaded."""

    def __init__(self, client: EngineClient, http: HttpSettings | None = None, *, wait: bool = True) -> None:
        self.client = client
        self._wait = wait
        self._server = _Server(configure(client, http or HttpSettings(shutdown_timeout=0.0)), lambda: None)
        self._sock = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]})

    def __enter__(self) -> RunningServer:
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60)
        if self._wait:
            until(lambda: self.http.get("/health").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, **body: Any) -> list[Any]:
        """The data of every event of a streamed completion; the last is `[DONE]`."""
        with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return list(parse_events(response.iter_raw()))

    def metric(self, name: str) -> float:
        """The value of one sample, labels included in its name."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def idle(self) -> bool:
        return self.metric("fastblt_num_requests_running") == 0 == self.metric("fastblt_num_requests_waiting")

    def assert_all_free(self) -> None:
        """Everything that requests held comes back."""
        until(self.idle)
        stats = self.client.stats()
        assert stats.pages_available == stats.pages_total


def parse_events(raw: Iterator[bytes]) -> Iterator[Any]:
    """Parses to the letter: every event is `data: `, one line of JSON or [DONE], and an empty line."""
    stream = b"".join(raw)
    assert stream.endswith(b"\n\n")
    for block in stream.removesuffix(b"\n\n").split(b"\n\n"):
        assert block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block, block
        data = block.removeprefix(b"data: ").decode()
        yield data if data == "[DONE]" else json.loads(data)


def joined(events: list[Any]) -> dict[int, str]:
    """The text of every choice of a streamed completion, by its index."""
    texts: dict[int, str] = defaultdict(str)
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
