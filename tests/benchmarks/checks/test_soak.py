"""A few seconds of the soak against a tiny model, and that its criteria can fail."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastblt.benchmarks.checks.soak import Sample, Tally, judge, load, settle
from fastblt.benchmarks.load.serving import serving
from tests.server.api.running import save_tiny

SMALL = [
    "--max-running",
    "4",
    "--max-waiting",
    "2",
    "--cache-size",
    "64MiB",
    "--max-model-len",
    "4096",
    "--threads",
    "1",
]


def test_a_few_seconds(tmp_path: Path) -> None:
    with serving(save_tiny(tmp_path), SMALL) as server:
        tally, samples = asyncio.run(load(server, 6.0, 16))
        report = judge(tally, samples, settle(server))
    # Too short for rates and memory.
    assert all(holds for name, holds in report["criteria"].items() if name not in ("throughput", "memory")), report
    assert tally.ends and tally.statuses[400] and len(samples) >= 3


def steady() -> tuple[Tally, list[Sample], dict[str, float]]:
    tally = Tally()
    tally.statuses.update({200: 10, 429: 5})
    samples = [Sample(float(i), 100.0 * i, 50 << 20, 500 << 20, 4, 2, 0.8 * i) for i in range(50)]
    final = {
        "fastblt_num_requests_running": 0.0,
        "fastblt_num_requests_waiting": 0.0,
        "fastblt_num_preemptions_total": 0.0,
        'fastblt_requests_rejected_total{cause="queue_full"}': 5.0,
        'fastblt_http_requests_total{handler="/v1/completions",method="POST",status="429"}': 5.0,
        'fastblt_cache_pages{group="global"}': 9.0,
        'fastblt_cache_pages_free{group="global"}': 9.0,
    }
    return tally, samples, final


def test_what_is_steady_passes() -> None:
    report = judge(*steady())
    assert report["passed"] and report["bytes_per_second"]["ratio"] == pytest.approx(1.0)


def _slow(tally: Tally, samples: list[Sample], final: dict[str, float]) -> None:
    samples[:] = [replace(s, bytes=s.bytes if s.seconds < 30 else 3000 + 80 * (s.seconds - 30)) for s in samples]


def _leaking(tally: Tally, samples: list[Sample], final: dict[str, float]) -> None:
    samples[:] = [replace(s, server_memory=int((50 + s.seconds) * 2**20)) for s in samples]


FAULTS: dict[str, Callable[[Tally, list[Sample], dict[str, float]], Any]] = {
    "throughput": _slow,
    "memory": _leaking,
    "nothing stuck": lambda tally, samples, final: final.update({"fastblt_num_requests_running": 1.0}),
    "pages balance": lambda tally, samples, final: final.update({'fastblt_cache_pages_free{group="global"}': 8.0}),
    "429s counted": lambda tally, samples, final: tally.statuses.update({429: 1}),
    "overload": lambda tally, samples, final: tally.statuses.pop(429),
    "no 5xx": lambda tally, samples, final: tally.statuses.update({500: 1}),
    "one end each": lambda tally, samples, final: tally.wrong.append("two ends"),
}


@pytest.mark.parametrize("criterion", FAULTS)
def test_each_criterion_can_fail(criterion: str) -> None:
    parts = copy.deepcopy(steady())
    FAULTS[criterion](*parts)
    report = judge(*parts)
    assert not report["criteria"][criterion] and not report["passed"]
