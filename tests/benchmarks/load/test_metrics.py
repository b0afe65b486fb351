"""Figures of records whose times are known."""

from __future__ import annotations

import pytest

from fastblt.benchmarks.load.client import Record
from fastblt.benchmarks.load.metrics import by_label, parse_levels, summarize


def record(start: float, times: list[float], size: int = 2, **more: object) -> Record:
    """A request that got `size` bytes at each of `times` after its start."""
    tokens = size * len(times)
    fields = {"prompt_tokens": 11, "output_tokens": tokens, "finish_reason": "length", "label": "blt"} | more
    return Record(
        prompt_bytes=10,
        start=start,
        ttft=times[0] if times else 0.0,
        latency=times[-1] if times else 0.0,
        chunks=[(at, size) for at in times],
        **fields,  # type: ignore[arg-type]
    )


def test_names_and_values() -> None:
    records = [record(0.0, [0.1, 0.3, 0.5]), record(0.4, [0.2, 0.4, 1.0]), record(1.0, [], error="timeout")]
    result = summarize(records, duration=2.0, levels={"ttft": 150.0, "e2el": 800.0})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_input_bytes"], result["total_output_bytes"]) == (22, 20, 12)
    assert result["request_throughput"] == 1.0 and result["output_throughput"] == 6.0
    assert result["mean_ttft_ms"] == pytest.approx(150) and result["p50_e2el_ms"] == pytest.approx(750)
    # Six tokens, of which five came after the first; four bytes after the first chunk.
    assert result["mean_tpot_ms"] == pytest.approx(1000 * (0.4 / 5 + 0.8 / 5) / 2)
    assert result["mean_tpob_ms"] == pytest.approx(1000 * (0.4 / 4 + 0.8 / 4) / 2)
    assert result["mean_itl_ms"] == pytest.approx(300) and result["max_concurrent_requests"] == 2
    assert result["request_goodput"] == 0.5 and result["errors_by_cause"] == {"timeout": 1}
    assert result["max_output_bytes_per_s"] == 10
    assert result["usage_reported"] and not summarize([record(0.0, [0.1], output_tokens=None)], 1.0)["usage_reported"]
    assert len(result["ttfts"]) == 2 and result["errors"] == ["", "", "timeout"]


def test_bytes_of_servers_whose_tokens_are_not() -> None:
    """Text is what counts there; a server of bytes shows an invalid byte as three and counts it as one."""
    one = record(0.0, [0.1, 0.5], size=9, output_tokens=4)
    assert summarize([one], 1.0, byte_tokens=False)["total_output_bytes"] == 18
    assert summarize([one], 1.0, byte_tokens=True)["total_output_bytes"] == 4
    assert summarize([one], 1.0, byte_tokens=False)["mean_tpob_ms"] == pytest.approx(400 / 9)
    assert summarize([one], 1.0, byte_tokens=True)["mean_tpob_ms"] == pytest.approx(400 / 2)


def test_groups_of_a_mix() -> None:
    records = [record(0.0, [0.1]), record(0.0, [0.2], label="blt-s"), record(0.0, [0.4], label="blt-s")]
    groups = by_label(records, 1.0)
    assert groups["blt-s"]["completed"] == 2 and groups["blt"]["median_ttft_ms"] == pytest.approx(100)
    assert by_label(records[:1], 1.0) == {}


def test_service_levels() -> None:
    assert parse_levels(["ttft:500", "tpob:2.5"]) == {"ttft": 500.0, "tpob": 2.5}
    for text in ("ttft", "ttft:0", "speed:3", "e2el:fast"):
        with pytest.raises(ValueError, match="service level"):
            parse_levels([text])
