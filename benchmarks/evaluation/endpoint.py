"""A client for the completions endpoint of a running server, used by all evaluations."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import httpx

from fastblt.benchmarks.load.client import IDLE_SECONDS
from fastblt.benchmarks.load.serving import serving

#: Seconds between attempts if the server is full or not ready and sends no Retry-After.
_PAUSE = 1.0
_TRIES = 60
_FIXED = [1, *(byte + 4 for byte in b"def mean(values):\n    return sum(values) / len(values)\n")]

T = TypeVar("T")


class EndpointError(RuntimeError):
    """The server cannot be reached, or refused a request for good. The message says why."""


@dataclass(frozen=True)
class Served:
    """A server's description of its model. Lengths are bytes, the threshold is nats.

    `fingerprint` is the log-likelihood (nats) of a fixed text. It distinguishes weights that have the same name.
    """

    name: str
    max_model_len: int
    block_sizes: tuple[int, ...] = ()
    patching_threshold: float | None = None
    max_patch_length: int | None = None
    fingerprint: float | None = None


@dataclass
class Completion:
    """The first choice of an answer, with usage and cost of the whole call. Times are seconds since the epoch."""

    text: str
    data: bytes
    finish_reason: str
    bytes: int
    efficiency: dict[str, Any]
    started: float
    ended: float
    logprobs: list[float | None] = field(default_factory=list)


class Endpoint:
    """Requests up to `concurrency` completions at a time. Waits and retries when the server's queue is full.

    `base_url` may end with `/v1` or not. `timeout` is seconds for one answer.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, concurrency: int = 32, timeout: float = 1800.0
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(
            max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=IDLE_SECONDS
        )
        self._client = httpx.AsyncClient(base_url=self.base_url, headers=headers, timeout=timeout, limits=limits)
        self.concurrency = concurrency
        self._turns = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def served(self) -> Served:
        """The server's model. Raises EndpointError."""
        [card, *_] = (await self._ask("GET", "/v1/models"))["data"]
        return Served(
            card["id"],
            card.get("max_model_len") or 2**31,
            tuple(card.get("block_sizes") or ()),
            card.get("patching_threshold"),
            card.get("max_patch_length"),
            # Rounded, since another batch may change the last digits.
            round(math.fsum(await self.score(_FIXED)), 2),
        )

    async def complete(self, prompt: str | list[int], **body: Any) -> Completion:
        """One completion. Raises EndpointError if it is refused, or ends other than by stop or length."""
        async with self._turns:
            started = time.time()
            answer = await self._ask("POST", "/v1/completions", {"prompt": prompt, "return_token_ids": True, **body})
            ended = time.time()
        choice = answer["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EndpointError(f"a completion ended with {choice['finish_reason']}")
        return Completion(
            choice["text"],
            # A byte is its id less four. Specials have no byte.
            bytes(token - 4 for token in choice["token_ids"] if token >= 4),
            choice["finish_reason"],
            answer["usage"]["completion_tokens"],
            answer.get("efficiency", {}),
            started,
            ended,
            (choice.get("logprobs") or {}).get("token_logprobs", []),
        )

    async def score(self, ids: list[int]) -> list[float]:
        """Log-probabilities (nats) of all ids but the first, which must be BOS. Raises EndpointError."""
        answer = await self.complete(ids, max_tokens=0, echo=True, logprobs=0, temperature=0)
        scores = [value for value in answer.logprobs if value is not None]
        if len(scores) != len(ids) - 1:
            raise EndpointError(f"{len(scores)} log-probabilities came back for {len(ids)} ids")
        return scores

    async def processor_seconds(self) -> float | None:
        """Processor seconds of the engine process so far; None if the server has no such metric."""
        try:
            response = await self._client.get("/metrics")
        except httpx.HTTPError:
            return None
        found = re.search(r"^fastblt_engine_process_cpu_seconds_total ([\d.e+]+)$", response.text, re.M)
        return float(found[1]) if found else None

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        for _ in range(_TRIES):
            try:
                response = await self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise EndpointError(f"cannot ask {self.base_url}: {type(error).__name__} {error}".rstrip()) from error
            if response.status_code not in (429, 503):
                break
            await asyncio.sleep(_pause(response))
        if response.status_code != 200:
            raise EndpointError(f"{self.base_url}{path} answered {response.status_code}: {_message(response)}")
        answer: dict[str, Any] = response.json()
        return answer


def _pause(response: httpx.Response) -> float:
    try:
        return min(60.0, max(0.05, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return _PAUSE


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently; returns their results in order. The first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass(frozen=True)
class Target:
    """The server to evaluate: the one at `base_url`, or else one that is started with `model` for the time of use, on
    `device` and with `dtype` (as in `fastblt serve`)."""

    base_url: str | None
    model: str
    api_key: str | None = None
    concurrency: int = 32
    device: str = "cpu"
    dtype: str | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Endpoint]:
        """An endpoint of the server. Raises RuntimeError if a server of `model` does not start."""
        with self.running() as url:
            async with Endpoint(url, self.api_key, self.concurrency) as endpoint:
                yield endpoint

    @contextmanager
    def running(self) -> Iterator[str]:
        """The URL of the running server. Raises RuntimeError as `open` does."""
        if self.base_url is not None:
            yield self.base_url
            return
        # The cache is sized by --max-running. With twice the concurrency, half of it is left for the prefix cache.
        options = ["--max-running", str(2 * self.concurrency), "--log-level", "warning", "--device", self.device]
        options += [] if self.dtype is None else ["--dtype", self.dtype]
        with _in_order(), serving(self.model, options) as server:
            yield server.url


@contextmanager
def _in_order() -> Iterator[None]:
    """Make SIGTERM exit the process in order, so that a server that it started is stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
