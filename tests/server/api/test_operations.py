"""Health, models, metrics, request ids: what operators and their tools see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.metrics import Histogram
from server.engine.client import EngineClient
from server.settings import EngineSettings
from tests.server.api import fake_engine
from tests.server.api.running import MODEL, RunningServer, until
from tests.server.api.test_bad_requests import assert_error


def test_health_and_readiness(server: RunningServer) -> None:
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/ready").status_code == 200
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]


def fake(**fields: Any) -> EngineClient:
    return EngineClient(EngineSettings(), command=fake_engine.command(**fields))


def test_while_loading(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with RunningServer(fake(gate=str(gate)), wait=False) as server:
        for path in ("/health", "/ready", "/v1/models"):
            assert assert_error(server.http.get(path), 503)["code"] == "loading"
        response = server.http.post("/v1/completions", json={"prompt": "Hi"})
        assert assert_error(response, 503)["code"] == "loading"
        assert "retry-after" in response.headers and "x-should-retry" not in response.headers
        assert server.http.get("/version").status_code == server.http.get("/metrics").status_code == 200
        gate.touch()
        until(lambda: server.http.get("/health").status_code == 200)
        assert server.complete(prompt="Hi", max_tokens=1)["choices"][0]["text"] == "a"


def test_when_the_engine_dies() -> None:
    with RunningServer(fake(fail_at=3)) as server:
        events = server.events(prompt="Hi", max_tokens=100)
        assert events[-1] == "[DONE]" and "RuntimeError" in events[-2]["error"]["message"]
        for path in ("/health", "/ready", "/v1/models"):
            assert assert_error(server.http.get(path), 503)["code"] == "dead"
        response = server.http.post("/v1/completions", json={"prompt": "Hi"})
        assert assert_error(response, 503)["code"] == "dead"
        assert response.headers["x-should-retry"] == "false"
        assert server.metric('fastblt_requests_rejected_total{cause="dead"}') == 1
        assert server.metric('fastblt_request_success_total{finished_reason="error"}') == 1


def test_an_unforeseen_error_is_a_500_that_tells_nothing() -> None:
    with RunningServer(fake(broken=True)) as server:
        response = server.http.post("/v1/completions", json={"prompt": "Hi"}, headers={"x-request-id": "mine"})
        assert "secret" not in assert_error(response, 500)["message"]
        assert response.headers["x-request-id"] == "mine"
        assert server.http.get("/health").status_code == 200


def test_models(server: RunningServer) -> None:
    answer = server.http.get("/v1/models").json()
    assert answer["object"] == "list"
    [card] = answer["data"]
    assert card["id"] == MODEL and card["object"] == "model"
    assert card["block_sizes"] == [4, 8] and card["patching_threshold"] > 0 and "max_patch_length" in card
    assert server.http.get(f"/v1/models/{MODEL}").json() == card
    # The limit that it states is the limit.
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": card["max_model_len"] - 2}
    assert_error(server.http.post("/v1/completions", json=body | {"max_tokens": card["max_model_len"] - 1}), 400)
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<script>", False), ("", False)],
)
def test_request_ids(server: RunningServer, asked: str, echoed: bool) -> None:
    for path in ("/health", "/nowhere"):
        answer = server.http.get(path, headers={"x-request-id": asked}).headers["x-request-id"]
        assert (answer == asked) == echoed and 1 <= len(answer) <= 128


def test_metrics(server: RunningServer) -> None:
    names = ("fastblt_generation_tokens_total", 'fastblt_nfe_total{module="decoder"}', "fastblt_passes_total")
    before = [server.metric(name) for name in names]
    gaps = server.metric("fastblt_inter_token_latency_seconds_count")
    # One pass a byte: drafts would add passes, as many as random bytes refuse.
    server.complete(prompt="Hello", max_tokens=10, n=3, ignore_eos=True, seed=1, decoding={"method": "blt"})
    after = [server.metric(name) for name in names]
    assert after[0] - before[0] == 30
    # A pass that three requests share counts once.
    assert 10 <= after[1] - before[1] < 30 and after[2] > before[2]
    # Every byte but the first of each.
    assert server.metric("fastblt_inter_token_latency_seconds_count") - gaps == 27
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert all(name.startswith("fastblt_") for name in families)
    expected = {
        "num_requests_running": "gauge",
        "num_requests_waiting": "gauge",
        "cache_pages": "gauge",
        "cache_pages_free": "gauge",
        "kv_cache_usage_perc": "gauge",
        "prompt_tokens": "counter",
        "generation_tokens": "counter",
        "nfe": "counter",
        "passes": "counter",
        "beats": "counter",
        "num_preemptions": "counter",
        "rounds": "counter",
        "denoising_steps": "counter",
        "patches": "counter",
        "wasted_tokens": "counter",
        "spec_decode_num_drafts": "counter",
        "spec_decode_num_draft_tokens": "counter",
        "spec_decode_num_accepted_tokens": "counter",
        "spec_decode_num_accepted_tokens_per_pos": "counter",
        "request_success": "counter",
        "requests_rejected": "counter",
        "time_to_first_token_seconds": "histogram",
        "inter_token_latency_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram",
    }
    for name, kind in expected.items():
        assert families[f"fastblt_{name}"].type == kind, name
    assert {s.labels["module"] for s in families["fastblt_nfe"].samples} == {"patcher", "encoder", "global", "decoder"}


def test_metrics_of_drafts(server: RunningServer) -> None:
    def values() -> dict[str, float]:
        stem = "fastblt_spec_decode_num"
        names = [f"{stem}_drafts_total", f"{stem}_draft_tokens_total", f"{stem}_accepted_tokens_total"]
        names += [f'{stem}_accepted_tokens_per_pos_total{{position="{position}"}}' for position in range(32)]
        names += ["fastblt_denoising_steps_total", "fastblt_rounds_total", "fastblt_patches_total"]
        return {name.removeprefix(f"{stem}_"): server.metric(name) for name in names}

    body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "seed": 3}
    before = values()
    server.complete(**body, decoding={"method": "blt-d"})
    after = values()
    # Blocks are no drafts.
    assert after["drafts_total"] == before["drafts_total"]
    assert after["fastblt_denoising_steps_total"] > before["fastblt_denoising_steps_total"]
    spent = server.complete(**body, decoding={"method": "blt-s", "draft_length": 4})["efficiency"]
    grown = {name: value - after[name] for name, value in values().items()}
    assert grown["drafts_total"] == grown["fastblt_rounds_total"] == spent["rounds"] > 0
    assert grown["draft_tokens_total"] == spent["drafted"]
    positions = [value for name, value in grown.items() if "per_pos" in name]
    assert sum(positions) == grown["accepted_tokens_total"] == spent["accepted"]
    assert positions == sorted(positions, reverse=True) and not any(positions[4:])
    assert grown["fastblt_patches_total"] == spent["patches"] > 0


def test_weighted_histogram() -> None:
    histogram = Histogram("h_seconds", "of h", (0.1, 1.0))
    histogram.observe(0.1)
    histogram.observe(0.5, 3)
    histogram.observe(7.0)
    [family] = histogram.collect()
    values = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert values == {"0.1": 1, "1.0": 4, "+Inf": 5, "h_seconds_count": 5, "h_seconds_sum": pytest.approx(8.6)}
