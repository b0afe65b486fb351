from __future__ import annotations

from fastblt.benchmarks.load.fairness import outputs, prompts, shared


def test_what_a_short_request_feels_beside_long_ones(checkpoint: str) -> None:
    beside_prompts = prompts(model=checkpoint, count=2, length=400)
    beside_outputs = outputs(model=checkpoint, streams=8, output=3_000)
    for found in (beside_prompts, beside_outputs):
        assert 0 < found["first_byte_p50_s"] <= found["first_byte_p95_s"] <= found["first_byte_max_s"]
        assert 0 < found["gap_p99_s"] <= found["gap_max_s"] and found["short_requests"] > 0
    assert beside_prompts["prompt_bytes_per_second"] > 0 and beside_outputs["bytes_per_second"] > 0


def test_shared_work_is_done_once(checkpoint: str) -> None:
    found = shared(model=checkpoint, length=600, n=8, prefix=400, together=8)
    assert found["n_over_one"] < 4 and found["at_once_over_one_after_another"] < 2
    assert found["unshared_s"] > 0
