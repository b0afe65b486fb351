"""A whole load run: makes the requests and their times, runs them, and gives the result as JSON and as a table."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastblt.benchmarks.load.arrivals import arrivals, read_trace, scale_trace
from fastblt.benchmarks.load.drive import Run, drive
from fastblt.benchmarks.load.metrics import by_label, parse_levels, summarize
from fastblt.benchmarks.load.names import Dataset, Ramp
from fastblt.benchmarks.load.workload import Job, jobs, parse_decoding, prompts, trace_jobs
from fastblt.benchmarks.machine import measured_with


@dataclass(frozen=True)
class Load:
    """Settings of a run, with the names of `vllm bench serve` where it has them.

    Lengths are bytes for prompts and the server's tokens for outputs. Rates are requests per second, `timeout` is
    seconds.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    num_prompts: int = 100
    dataset: Dataset = Dataset.HELD_OUT
    dataset_path: Path | None = None
    input_len: int | None = None
    output_len: int = 128
    prefix_len: int = 0
    prefixes: int = 1
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp: Ramp | None = None
    ramp_end_rate: float | None = None
    max_concurrency: int | None = None
    trace: Path | None = None
    trace_first: int = 0
    trace_rate: float | None = None
    prompt_factor: float = 1.0
    output_factor: float = 1.0
    max_prompt_bytes: int | None = None
    max_output_bytes: int | None = None
    decoding: tuple[str, ...] = ()
    temperature: float = 0.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    goodput: tuple[str, ...] = ()
    warm_up: int = 1
    seed: int = 0
    timeout: float = 600.0


def run(load: Load, *, show: bool = True) -> dict[str, Any]:
    """Run the load. The result has the names of `vllm bench serve`.

    Raises ValueError for invalid settings, or if the server cannot be reached.
    """
    levels = parse_levels(load.goodput)
    todo, times, factors = _plan(load)
    done = asyncio.run(
        drive(
            load.base_url.rstrip("/").removesuffix("/v1"),
            todo,
            times,
            model=load.model,
            max_concurrency=load.max_concurrency,
            warm_up=load.warm_up,
            timeout=load.timeout,
            show=show,
        )
    )
    return result(load, done, levels, factors)


def result(load: Load, done: Run, levels: dict[str, float], factors: dict[str, float]) -> dict[str, Any]:
    options: dict[str, Any] = {"levels": levels, "byte_tokens": done.byte_tokens}
    settings = {name: value.name if isinstance(value, Path) else value for name, value in asdict(load).items()}
    return {
        **measured_with(),
        "backend": "openai",
        "endpoint_type": "openai",
        "label": None,
        "model_id": done.card["id"],
        "tokenizer_id": "bytes" if done.byte_tokens else None,
        "num_prompts": len(done.records),
        "request_rate": "inf" if load.request_rate == math.inf else load.request_rate,
        "burstiness": "inf" if load.burstiness == math.inf else load.burstiness,
        "max_concurrency": load.max_concurrency,
        "goodput_ms": levels,
        "trace_factors": factors,
        "settings": {name: "inf" if value == math.inf else value for name, value in settings.items()},
        **summarize(done.records, done.duration, **options),
        "by_method": by_label(done.records, done.duration, **options),
    }


def _plan(load: Load) -> tuple[list[Job], NDArray[np.float64] | None, dict[str, float]]:
    """The requests, their times (None: as soon as possible), and the factors by which a trace was scaled."""
    common: dict[str, Any] = {"temperature": load.temperature, **load.extra_body}
    if load.ignore_eos:
        common["ignore_eos"] = True
    bodies: Sequence[dict[str, Any]] = [parse_decoding(text) for text in load.decoding] or [{}]
    if load.trace is not None:
        trace = scale_trace(
            read_trace(load.trace, load.trace_first, load.num_prompts),
            rate=load.trace_rate,
            prompt_factor=load.prompt_factor,
            output_factor=load.output_factor,
            max_prompt_bytes=load.max_prompt_bytes,
            max_output_bytes=load.max_output_bytes,
        )
        return trace_jobs(trace, bodies, common, load.seed), trace.seconds, trace.factors
    asked = prompts(
        load.dataset,
        load.num_prompts,
        load.input_len,
        load.seed,
        path=load.dataset_path,
        prefix_len=load.prefix_len,
        prefixes=load.prefixes,
    )
    todo = jobs(asked, load.output_len, bodies, common, load.seed)
    if load.request_rate == math.inf and load.ramp is None:
        return todo, None, {}
    times = arrivals(
        len(todo), load.request_rate, load.burstiness, load.seed, ramp=load.ramp, end_rate=load.ramp_end_rate
    )
    return todo, times, {}


_LINES = (
    ("Successful requests", "completed", "{:.0f}"),
    ("Failed requests", "failed", "{:.0f}"),
    ("Duration, s", "duration", "{:.2f}"),
    ("Input bytes", "total_input_bytes", "{:.0f}"),
    ("Output bytes", "total_output_bytes", "{:.0f}"),
    ("Output tokens (the server's)", "total_output_tokens", "{:.0f}"),
    ("Requests/s", "request_throughput", "{:.3f}"),
    ("Goodput, requests/s", "request_goodput", "{:.3f}"),
    ("Output bytes/s", "output_byte_throughput", "{:.1f}"),
    ("Output bytes in the busiest second", "max_output_bytes_per_s", "{:.0f}"),
    ("Most requests at once", "max_concurrent_requests", "{:.0f}"),
)
_SERIES = (
    ("First chunk", "ttft"),
    ("Time per byte after it", "tpob"),
    ("Between chunks", "itl"),
    ("Whole request", "e2el"),
    ("Waiting in this client", "client_queue_time"),
)


def table(result: dict[str, Any]) -> str:
    """A result as text."""
    rows = [f"{name:<38}{form.format(result[key])}" for name, key, form in _LINES if result.get(key) is not None]
    rows.append(f"\n{'ms':<26}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}")
    for name, key in _SERIES:
        if f"mean_{key}_ms" in result:
            figures = [result[f"mean_{key}_ms"]] + [result[f"p{share}_{key}_ms"] for share in (50, 90, 95, 99)]
            rows.append(f"{name:<26}" + "".join(f"{value:>10.2f}" for value in figures))
    if result["goodput_ms"]:
        rows.append(
            "\nGoodput: " + ", ".join(f"{name} <= {limit:g} ms" for name, limit in result["goodput_ms"].items())
        )
    if result["trace_factors"]:
        rows.append("Trace: " + ", ".join(f"{name} {value:.4g}" for name, value in result["trace_factors"].items()))
    for cause, count in result["errors_by_cause"].items():
        rows.append(f"Error: {cause} ({count})")
    for method, part in result["by_method"].items():
        first = part.get("median_ttft_ms", math.nan)
        rows.append(
            f"{method:<24}{part['completed']:>6} done {part['output_byte_throughput']:>9.1f} bytes/s, first chunk "
            f"{first:.0f} ms, {part.get('median_tpob_ms', math.nan):.2f} ms a byte"
        )
    return "\n".join(rows)
