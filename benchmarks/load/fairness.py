"""What one client feels of the others: first bytes beside long prompts and long outputs, and work that is shared.

    python -m fastblt.benchmarks.load.fairness prompts --count 8   a short request a second beside 8 long prompts
    python -m fastblt.benchmarks.load.fairness outputs             the same beside 64 long outputs
    python -m fastblt.benchmarks.load.fairness shared              n = 16 of a long prompt; a prefix that eight share
    python -m fastblt.benchmarks.load.fairness memory              24 prompts in 32 MiB of cache

    python -m fastblt.benchmarks.load.fairness trace FILE --rate 17.673

With `--against CHECKOUT --turns 1` the server of another checkout is measured too.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.client import Endpoint, Record, first_model
from fastblt.benchmarks.load.serve import Load
from fastblt.benchmarks.load.serve import run as serve
from fastblt.benchmarks.load.serving import Server, serving
from fastblt.benchmarks.load.workload import Job, Texts, held_out_text
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.report.parts import LEVELS
from fastblt.server.settings import PRETRAINED

_SHORT, _SHORT_OUTPUT = 50, 16
_WHOLE = {"ignore_eos": True, "temperature": 0.0}


def prompts(
    *, model: str = str(PRETRAINED), count: int = 8, length: int = 30_000, finished: int = 6, seed: int = 0
) -> dict[str, Any]:
    """A short request a second, and a stream that decodes, beside `count` prompts of `length` bytes, until `finished`
    of these have their first byte."""

    async def run(endpoint: Endpoint, texts: Texts) -> dict[str, Any]:
        stream = asyncio.create_task(_stream(endpoint, texts))
        await asyncio.sleep(2.0)
        began = time.perf_counter()
        waiting = {_ask(endpoint, texts.cut(length), 16) for _ in range(count)}
        short = asyncio.create_task(_every_second(endpoint, texts))
        done = 0
        while done < min(finished, count):
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done += len(ended)
            _check([task.result() for task in ended])
        seconds = time.perf_counter() - began
        gaps = [gap for at, gap in await _ended(stream) if at > began]
        return {
            "prompt_bytes_per_second": done * length / seconds,
            **_firsts(await _ended(short)),
            "gap_p99_s": _percentile(gaps, 0.99),
            "gap_max_s": max(gaps),
        }

    return _measured(model, run, seed)


def outputs(*, model: str = str(PRETRAINED), streams: int = 64, output: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """A short request a second while `streams` requests decode `output` bytes each."""

    async def run(endpoint: Endpoint, texts: Texts) -> dict[str, Any]:
        began = time.perf_counter()
        long = [_ask(endpoint, texts.cut(256), output) for _ in range(streams)]
        # Their prompts take that long.
        await asyncio.sleep(streams / 32)
        short = asyncio.create_task(_every_second(endpoint, texts))
        records = _check(await asyncio.gather(*long))
        seconds = time.perf_counter() - began
        gaps = [b[0] - a[0] for record in records for a, b in itertools.pairwise(record.chunks)]
        return {
            "bytes_per_second": streams * output / seconds,
            **_firsts(await _ended(short)),
            "gap_p99_s": _percentile(gaps, 0.99),
            "gap_max_s": max(gaps),
        }

    return _measured(model, run, seed)


def shared(
    *,
    model: str = str(PRETRAINED),
    length: int = 20_000,
    n: int = 16,
    prefix: int = 8_000,
    together: int = 8,
    rounds: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """The last first byte of `n` choices of a prompt over that of one; and of `together` requests that begin with the
    same `prefix` bytes, at once over one after another. `unshared`: as many requests that share nothing, at once."""

    async def run(endpoint: Endpoint, texts: Texts) -> dict[str, Any]:
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, choices in (("one", 1), ("n", n)):
                body = {"n": choices, "seed": 0, **_WHOLE, "temperature": 1.0}
                found.setdefault(name, []).append(await _timed([_ask(endpoint, texts.cut(length), 1, body)]))
            for name, at_once in (("one_after_another", False), ("at_once", True)):
                common = texts.cut(prefix)
                asked = [common + texts.cut(_SHORT) for _ in range(together)]
                if at_once:
                    seconds = await _timed([_ask(endpoint, text, 1) for text in asked])
                else:
                    seconds = sum([await _timed([_ask(endpoint, text, 1)]) for text in asked])
                found.setdefault(name, []).append(seconds)
            different = [_ask(endpoint, texts.cut(prefix + _SHORT), 1) for _ in range(together)]
            found.setdefault("unshared", []).append(await _timed(different))
        middle = {f"{name}_s": statistics.median(values) for name, values in found.items()}
        return middle | {
            "n_over_one": middle["n_s"] / middle["one_s"],
            "at_once_over_one_after_another": middle["at_once_s"] / middle["one_after_another_s"],
        }

    return _measured(model, run, seed)


def memory(
    *,
    model: str = str(PRETRAINED),
    count: int = 24,
    length: int = 3_300,
    output: int = 200,
    cache: str = "32MiB",
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds and preemptions of `count` prompts at once in little memory."""

    async def run(endpoint: Endpoint, texts: Texts) -> dict[str, Any]:
        began = time.perf_counter()
        _check(await asyncio.gather(*(_ask(endpoint, texts.cut(length), output) for _ in range(count))))
        return {"seconds": time.perf_counter() - began}

    return _measured(model, run, seed, "--cache-size", cache)


def trace(
    file: Path,
    *,
    model: str = str(PRETRAINED),
    rate: float = 10.0,
    prompt_factor: float = 0.05,
    output_factor: float = 1.0,
    count: int = 300,
    method: str = "auto",
) -> dict[str, Any]:
    """The share of good requests of a recorded trace, as `fastblt bench all` replays it: first byte within 1,000 ms,
    50 ms a byte after it."""
    with serving(model, ["--log-level", "warning", "--max-waiting", "4096", "--method", method]) as server:
        load = Load(
            server.url,
            num_prompts=count,
            trace=file,
            trace_rate=rate,
            prompt_factor=prompt_factor,
            output_factor=output_factor,
            max_prompt_bytes=4000,
            max_output_bytes=1000,
            goodput=LEVELS,
        )
        found = serve(load, show=False)
    names = ("output_byte_throughput", "p50_ttft_ms", "p95_ttft_ms", "p95_tpob_ms", "p99_itl_ms", "duration")
    return _shown({"good": found["good_requests"] / count} | {name: found[name] for name in names})


def _measured(
    model: str, run: Callable[[Endpoint, Texts], Awaitable[dict[str, Any]]], seed: int, *options: str
) -> dict[str, Any]:
    """Run a load against a server of its own. Prints and returns the figures, with those of its metrics that matter."""

    async def load(server: Server) -> dict[str, Any]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=2**20) as session:
            card = await first_model(session, server.url)
            endpoint, texts = Endpoint(server.url, card["id"], session, 1200.0), Texts(held_out_text(), seed)
            await _ask(endpoint, texts.cut(300), 50)
            return await run(endpoint, texts)

    with serving(model, ["--log-level", "warning", *options]) as server:
        found = asyncio.run(load(server))
        time.sleep(1.5)
        metrics = server.metrics()
        for name in ("num_preemptions", "turns", "prefix_cache_joined", "prompt_passes_late", "prompt_passes"):
            if (value := metrics.get(f"fastblt_{name}_total")) is not None:
                found[name] = value
    return _shown(found)


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    table = Table("figure", "")
    for name, value in found.items():
        table.row(name, f"{value:.4g}")
    return found


def _ask(endpoint: Endpoint, prompt: str, output: int, extra: dict[str, Any] | None = None) -> asyncio.Task[Record]:
    return asyncio.create_task(endpoint.ask(Job(prompt, output, extra or _WHOLE)))


async def _every_second(endpoint: Endpoint, texts: Texts) -> list[Record]:
    """Short requests, one a second, until this is cancelled."""
    asked: list[tuple[float, asyncio.Task[Record]]] = []
    records: list[Record] = []
    try:
        while True:
            asked.append((time.perf_counter(), _ask(endpoint, texts.cut(_SHORT), _SHORT_OUTPUT)))
            await asyncio.sleep(1.0)
    except asyncio.CancelledError:
        for began, task in asked:
            waited = time.perf_counter() - began
            if task.done():
                records += _check([task.result()])
            elif waited > 1.0:
                # It has waited for so long at least.
                records.append(Record("", _SHORT, ttft=waited))
            task.cancel()
        return records


async def _stream(endpoint: Endpoint, texts: Texts) -> list[tuple[float, float]]:
    """A stream that decodes until this is cancelled: when a chunk came, and the seconds since the one before."""
    found: list[tuple[float, float]] = []
    body = {"model": endpoint.model, "max_tokens": 16_000, "stream": True, **_WHOLE}
    async with aiohttp.ClientSession(read_bufsize=2**20) as session:
        try:
            while True:
                last = 0.0
                asked = session.post(f"{endpoint.base_url}/v1/completions", json=body | {"prompt": texts.cut(256)})
                async with asked as answer:
                    async for line in answer.content:
                        if line.startswith(b"data:"):
                            now = time.perf_counter()
                            if last:
                                found.append((now, now - last))
                            last = now
        except asyncio.CancelledError:
            return found


async def _ended(task: asyncio.Task[Any]) -> Any:
    task.cancel()
    return await task


async def _timed(tasks: list[asyncio.Task[Record]]) -> float:
    """Seconds until the last of requests has its last first byte."""
    began = time.perf_counter()
    _check(await asyncio.gather(*tasks))
    return time.perf_counter() - began


def _check(records: list[Record]) -> list[Record]:
    for record in records:
        if record.error:
            raise RuntimeError(record.error)
    return records


def _firsts(records: list[Record]) -> dict[str, float]:
    if not records:
        raise RuntimeError("no short request was answered: the long ones ended too soon; ask for more of them")
    values = [record.ttft for record in records]
    return {
        "first_byte_p50_s": _percentile(values, 0.5),
        "first_byte_p95_s": _percentile(values, 0.95),
        "first_byte_max_s": max(values),
        "short_requests": len(values),
    }


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


app = command(prompts, outputs, shared, memory, trace)

if __name__ == "__main__":
    app()
