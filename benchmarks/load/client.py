"""Requests streamed completions from any server with OpenAI's completions API, and times each chunk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from fastblt.benchmarks.load.workload import Job

#: Seconds for which an idle connection is used again. Some servers close theirs after 5, and lose what is on its way.
IDLE_SECONDS = 2.0


@dataclass
class Record:
    """The result of one request. Times are seconds.

    `start` is measured from the start of the run. `queued` is the wait for a free place in the client. `ttft` is the
    time to the first chunk, `latency` to the last. `chunks` are (time after the request's start, bytes of text).
    `error` is empty if all went well.
    """

    label: str
    prompt_bytes: int
    start: float = 0.0
    queued: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str = ""

    @property
    def text_bytes(self) -> int:
        return sum(size for _, size in self.chunks)


class Endpoint:
    """A server, and the name of its model."""

    def __init__(self, base_url: str, model: str, session: aiohttp.ClientSession, timeout: float) -> None:
        self.base_url, self.model = base_url, model
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def ask(self, job: Job) -> Record:
        """Send one request and read its answer to the end. A failure is described in the record's `error`."""
        record = Record(job.label, job.prompt_bytes)
        body = {
            "model": self.model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **job.extra,
        }
        begin = time.perf_counter()
        try:
            url = f"{self.base_url}/v1/completions"
            async with self._session.post(url, json=body, timeout=self._timeout) as answer:
                if answer.status != 200:
                    record.error = _refusal(answer.status, await answer.text())
                else:
                    async for line in answer.content:
                        self._take(record, line, time.perf_counter() - begin)
                    if not record.error and record.finish_reason is None:
                        record.error = "stream ended early"
        except TimeoutError:
            record.error = "timeout"
        except aiohttp.ClientConnectorError:
            record.error = "cannot connect"
        except aiohttp.ClientError as error:
            record.error = f"connection lost ({type(error).__name__})"
        return record

    def _take(self, record: Record, line: bytes, now: float) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except json.JSONDecodeError:
            record.error = "an event that is no JSON"
            return
        if not isinstance(event, dict) or "error" in event:
            record.error = _stream_error(event)
            return
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.output_tokens = usage.get("completion_tokens")
        for choice in event.get("choices") or ():
            text = choice.get("text") or ""
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if text or record.finish_reason:
                record.ttft = record.ttft or now
                record.latency = now
                record.chunks.append((now, len(text.encode("utf-8", "surrogatepass"))))


async def first_model(session: aiohttp.ClientSession, base_url: str) -> dict[str, Any]:
    """The first model that a server lists. Raises ValueError, with advice, if there is none."""
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=30)) as answer:
            if answer.status != 200:
                raise ValueError(f"{url} answers {answer.status}; give --model, or a key in FASTBLT_API_KEY")
            listed = (await answer.json()).get("data") or []
    except (TimeoutError, aiohttp.ClientError) as error:
        raise ValueError(f"{url} cannot be asked ({error}); start the server, or correct --base-url") from error
    if not listed:
        raise ValueError(f"{url} lists no model; give --model")
    return dict(listed[0])


def _refusal(status: int, text: str) -> str:
    """The status, with the server's code for the error if it has one."""
    try:
        answer = json.loads(text)
        error = answer.get("error") or answer
        detail = error.get("code") or error.get("type") or error.get("detail") or ""
    except (ValueError, AttributeError):
        detail = ""
    return f"HTTP {status} {str(detail)[:80]}".strip()


def _stream_error(event: Any) -> str:
    error = event.get("error") if isinstance(event, dict) else None
    detail = error.get("code") or error.get("type") if isinstance(error, dict) else None
    return f"error in the stream ({detail})" if detail else "error in the stream"
