"""Speed without a server: `fastblt bench throughput` and `fastblt bench latency`. Results have vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastblt.benchmarks.machine import measured_with
from fastblt.server.llm import LLM
from fastblt.server.request import DecodingParams, SamplingParams


def throughput(llm: LLM, prompts: Sequence[bytes], output_len: int, decoding: DecodingParams) -> dict[str, Any]:
    """Run all prompts at once, `output_len` bytes each, after one warm-up request. Tokens are bytes."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, decoding=decoding)
    llm.generate(prompts[0][::-1], SamplingParams(max_tokens=8, temperature=0.0, decoding=decoding))
    start = time.perf_counter()
    outputs = llm.generate(list(prompts), params)
    elapsed = time.perf_counter() - start
    made = sum(len(output.ids) for output in outputs)
    total = made + sum(map(len, prompts))
    return {
        **measured_with(),
        "elapsed_time": elapsed,
        "num_requests": len(prompts),
        "total_num_tokens": total,
        "requests_per_second": len(prompts) / elapsed,
        "tokens_per_second": total / elapsed,
        "output_bytes_per_second": made / elapsed,
    }


def latency(
    llm: LLM, prompts: Sequence[bytes], output_len: int, decoding: DecodingParams, *, iterations: int, warm_up: int
) -> dict[str, Any]:
    """Seconds to complete one batch of prompts, measured `iterations` times. The prefix cache must be off."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, decoding=decoding)
    latencies = []
    for number in range(warm_up + iterations):
        start = time.perf_counter()
        llm.generate(list(prompts), params)
        if number >= warm_up:
            latencies.append(time.perf_counter() - start)
    shares = (10, 25, 50, 75, 90, 99)
    return {
        **measured_with(),
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(share): float(np.percentile(latencies, share)) for share in shares},
        "output_bytes_per_second": len(prompts) * output_len / float(np.median(latencies)),
    }
