"""Computes the figures of a run from its records, under the names of `vllm bench serve`.

Tokens are the server's own, by its `usage`. For a byte-level server a token is a byte. Other servers' tokens are not,
so everything is also counted in bytes of text: `*_bytes`, `*_byte_*` and `tpob`, the time per byte after the first
chunk. `itl` is the time between chunks. For a byte-level server, bytes are counted as its tokens and not by the text,
in which an invalid byte takes three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastblt.benchmarks.load.client import Record

#: The metrics of service levels, each as a function of (record, tokens, bytes) that gives seconds, or None.
LEVELS: dict[str, Callable[[Record, int, int], float | None]] = {
    "ttft": lambda record, _tokens, _size: record.ttft,
    "tpot": lambda record, tokens, _size: (record.latency - record.ttft) / (tokens - 1) if tokens > 1 else None,
    "tpob": lambda record, _tokens, size: _after_first(record, size),
    "e2el": lambda record, _tokens, _size: record.latency,
}


def parse_levels(texts: Sequence[str]) -> dict[str, float]:
    """Service levels in milliseconds from `ttft:500` and the like. Raises ValueError."""
    levels = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            levels[name] = float(value)
        except ValueError:
            levels[name] = 0.0
        if name not in LEVELS or not levels[name] > 0:
            raise ValueError(f"{text!r} is no service level; write {', '.join(LEVELS)}, then a colon and ms")
    return levels


def summarize(
    records: Sequence[Record],
    duration: float,
    *,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    levels: Mapping[str, float] | None = None,
    byte_tokens: bool = True,
    detailed: bool = True,
) -> dict[str, Any]:
    """Figures of a run of `duration` seconds. Failed requests are counted in `failed` and nowhere else.

    `levels` are service levels in milliseconds. `detailed` adds vLLM's lists with a value for each request.
    """
    done = [record for record in records if not record.error]
    tokens = [record.text_bytes if record.output_tokens is None else record.output_tokens for record in done]
    sizes = tokens if byte_tokens else [record.text_bytes for record in done]
    prompts = [record.prompt_bytes if record.prompt_tokens is None else record.prompt_tokens for record in done]
    prompt_bytes = sum(record.prompt_bytes for record in done)
    good = sum(
        all(
            (value := LEVELS[name](record, count, size)) is None or 1000 * value <= limit
            for name, limit in (levels or {}).items()
        )
        for record, count, size in zip(done, tokens, sizes, strict=True)
    )
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": sum(prompts),
        "total_output_tokens": sum(tokens),
        "total_input_bytes": prompt_bytes,
        "total_output_bytes": sum(sizes),
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if levels else None,
        "good_requests": good if levels else None,
        "output_throughput": sum(tokens) / duration,
        "total_token_throughput": (sum(prompts) + sum(tokens)) / duration,
        # Without `usage` the number of tokens is unknown, and the bytes of text are used.
        "usage_reported": all(record.output_tokens is not None for record in done),
        "output_byte_throughput": sum(sizes) / duration,
        "total_byte_throughput": (prompt_bytes + sum(sizes)) / duration,
        "max_output_bytes_per_s": _busiest_second(done),
        "max_concurrent_requests": _most_together(done),
        "errors_by_cause": dict(Counter(record.error for record in records if record.error)),
    }
    series: dict[str, list[float | None]] = {
        name: [value(*row) for row in zip(done, tokens, sizes, strict=True)] for name, value in LEVELS.items()
    }
    series["itl"] = [gap for record in done for gap in _gaps(record)]
    series["client_queue_time"] = [record.queued for record in done]
    for name, values in series.items():
        result |= _statistics(name, [value for value in values if value is not None], percentiles)
    if detailed:
        result |= {
            "input_lens": prompts,
            "output_lens": tokens,
            "ttfts": [record.ttft for record in done],
            "itls": [[round(gap, 5) for gap in _gaps(record)] for record in done],
            "latencies": [record.latency for record in done],
            "start_times": [record.start for record in done],
            "queue_times": [record.queued for record in done],
            "errors": [record.error for record in records],
        }
    return result


def by_label(records: Sequence[Record], duration: float, **options: Any) -> dict[str, Any]:
    """The figures of every group of requests; empty if there is only one group."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.label, []).append(record)
    if len(groups) < 2:
        return {}
    return {name: summarize(group, duration, detailed=False, **options) for name, group in sorted(groups.items())}


def _after_first(record: Record, size: int) -> float | None:
    """Seconds per byte after the first chunk. `size`: bytes of all chunks, of which each has a share by its text."""
    if not record.text_bytes:
        return None
    later = size * (1 - record.chunks[0][1] / record.text_bytes)
    return (record.latency - record.ttft) / later if later > 0 else None


def _gaps(record: Record) -> list[float]:
    times = [at for at, _ in record.chunks]
    return [later - earlier for earlier, later in pairwise(times)]


def _statistics(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; empty without values."""
    if not values:
        return {}
    array = 1000 * np.array(values)
    result = {
        f"mean_{name}_ms": float(array.mean()),
        f"median_{name}_ms": float(np.median(array)),
        f"std_{name}_ms": float(array.std()),
    }
    return result | {f"p{share:g}_{name}_ms": float(np.percentile(array, share)) for share in percentiles}


def _busiest_second(records: Sequence[Record]) -> int:
    seconds: Counter[int] = Counter()
    for record in records:
        for at, size in record.chunks:
            seconds[int(record.start + at)] += size
    return max(seconds.values(), default=0)


def _most_together(records: Sequence[Record]) -> int:
    changes = sorted([(r.start, 1) for r in records] + [(r.start + r.latency, -1) for r in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
