"""Sends requests at their times, and shows the progress."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastblt.benchmarks.load.client import IDLE_SECONDS, Endpoint, Record, first_model
from fastblt.benchmarks.load.workload import Job


@dataclass
class Run:
    """All records in the order of their requests, the duration in seconds, and the server's model card."""

    records: list[Record]
    duration: float
    card: dict[str, Any]

    @property
    def byte_tokens(self) -> bool:
        """Whether the server is a FastBLT, whose tokens are bytes."""
        return self.card.get("owned_by") == "fastblt"


async def drive(
    base_url: str,
    jobs: Sequence[Job],
    times: NDArray[np.float64] | None,
    *,
    model: str | None = None,
    max_concurrency: int | None = None,
    warm_up: int = 1,
    timeout: float = 600.0,
    show: bool = True,
) -> Run:
    """Send `jobs` at `times` (seconds [n]; None: as soon as there is a place), at most `max_concurrency` at once.

    First, `warm_up` requests are sent one after another. They are not counted, and have prompts of their own, so that
    they do not fill a prefix cache for the run. Raises ValueError if the server cannot be reached or refuses the
    warm-up.
    """
    async with _session() as session:
        card = await first_model(session, base_url) if model is None else {"id": model}
        endpoint = Endpoint(base_url, str(card["id"]), session, timeout)
        for number in range(warm_up):
            first = jobs[number % len(jobs)]
            # The prompt is reversed: measured requests must not find it in a prefix cache.
            record = await endpoint.ask(Job(f"# {number}\n{first.prompt[::-1]}", first.max_tokens, first.extra))
            if record.error:
                raise ValueError(f"the warm-up request failed: {record.error}; is {base_url} an OpenAI-style server?")
        places = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        records = [Record(job.label, job.prompt_bytes) for job in jobs]
        running: set[int] = set()
        done: list[int] = []
        start = time.perf_counter()

        async def one(index: int) -> None:
            arrived = time.perf_counter()
            async with places:
                sent = time.perf_counter()
                running.add(index)
                record = await endpoint.ask(jobs[index])
                record.start, record.queued = sent - start, sent - arrived
                records[index] = record
                running.discard(index)
                done.append(index)

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as group:
                for index in range(len(jobs)):
                    if times is not None:
                        await asyncio.sleep(max(0.0, start + float(times[index]) - time.perf_counter()))
                    group.create_task(one(index))

        async with _progress(records, running, done, start, show):
            await all_of_them()
        return Run(records, time.perf_counter() - start, card)


def _session() -> aiohttp.ClientSession:
    key = os.environ.get("FASTBLT_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        read_bufsize=2**20,
        max_line_size=2**20,
    )


@contextlib.asynccontextmanager
async def _progress(
    records: Sequence[Record], running: set[int], done: list[int], start: float, show: bool
) -> AsyncIterator[None]:
    """Show the progress of the run in a line, updated twice a second on a terminal."""
    if not show:
        yield
        return

    def line() -> Text:
        seconds = time.perf_counter() - start
        ended = [records[index] for index in done]
        good = [record for record in ended if not record.error]
        size = sum(record.output_tokens or record.text_bytes for record in good)
        waits = sorted(record.ttft for record in good[-200:])
        first = f"{1000 * waits[len(waits) // 2]:.0f} ms" if waits else "-"
        rest = (len(records) - len(ended)) * seconds / len(ended) if ended else math.nan
        return Text(
            f"{len(ended)}/{len(records)} done, {len(running)} running, {len(ended) - len(good)} failed, "
            f"{size / seconds:.0f} tokens/s, first chunk {first}, {seconds:.0f} s, about {rest:.0f} s to go"
        )

    with Live(line(), console=Console(file=sys.stderr), refresh_per_second=2, transient=True) as live:

        async def renew() -> None:
            while True:
                await asyncio.sleep(0.5)
                live.update(line())

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
