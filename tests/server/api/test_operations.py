"""Health, models, metrics, request ids: what operators and their tools see."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastblt.server.api.histogram import Histogram
from fastblt.server.api.serve import listen
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings, HttpSettings
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
        # The connection ends with it, and says so: the next request takes another.
        assert response.headers["connection"] == "close"
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
        "cache_pages_cached": "gauge",
        "prefix_cache_queries": "counter",
        "prefix_cache_hits": "counter",
        "kv_cache_usage_perc": "gauge",
        "prompt_tokens": "counter",
        "generation_tokens": "counter",
        "nfe": "counter",
        "passes": "counter",
        "beats": "counter",
        "num_preemptions": "counter",
        "turns": "counter",
        "prompt_passes": "counter",
        "prompt_passes_late": "counter",
        "prefix_cache_joined": "counter",
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
        "requests_failed": "counter",
        "requests_aborted": "counter",
        "corrupted_requests": "counter",
        "http_requests": "counter",
        "holds": "counter",
        "engine_restarts": "counter",
        "engine_state": "gauge",
        "cache_config_info": "gauge",
        "process_resident_memory_bytes": "gauge",
        "engine_process_resident_memory_bytes": "gauge",
        "spec_decode_num_draft_tokens_per_pos": "counter",
        "http_request_duration_seconds": "histogram",
        "request_queue_time_seconds": "histogram",
        "time_to_first_token_by_prompt_seconds": "histogram",
        "rejected_queue_time_seconds": "histogram",
        "request_inference_time_seconds": "histogram",
        "request_prefill_time_seconds": "histogram",
        "request_decode_time_seconds": "histogram",
        "request_time_per_output_token_seconds": "histogram",
        "request_prompt_tokens": "histogram",
        "request_generation_tokens": "histogram",
        "request_params_max_tokens": "histogram",
        "request_bytes_per_patch": "histogram",
        "request_bytes_per_pass": "histogram",
        "request_denoising_steps_per_block": "histogram",
        "time_to_first_token_seconds": "histogram",
        "inter_token_latency_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram",
    }
    for name, kind in expected.items():
        assert families[f"fastblt_{name}"].type == kind, name
    assert {s.labels["module"] for s in families["fastblt_nfe"].samples} == {"patcher", "encoder", "global", "decoder"}


def test_times_of_a_request_add_up(server: RunningServer) -> None:
    def sums(*names: str) -> list[float]:
        return [server.metric(f"fastblt_{name}_sum") for name in names]

    names = (
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "time_to_first_token_seconds",
        "request_generation_tokens", "request_prompt_tokens", "request_params_max_tokens",
    )  # fmt: skip
    before = sums(*names)
    server.complete(prompt="Hello", max_tokens=40, ignore_eos=True, seed=1)
    whole, queue, inference, prefill, decode, first, *lengths = [
        b - a for a, b in zip(before, sums(*names), strict=True)
    ]
    assert whole == pytest.approx(queue + inference) and inference == pytest.approx(prefill + decode)
    assert first == pytest.approx(queue + prefill)
    assert min(queue, prefill, decode) > 0 and lengths == [40, 5, 40]


def test_gauges_of_routers_under_vllm_s_names() -> None:
    with RunningServer(fake(), HttpSettings(vllm_metrics=True, shutdown_timeout=0.0)) as server:
        text = server.http.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"):
        assert f"vllm:{name}{{" in text and 'model_name="fake"' in text


def test_failures_are_counted_by_cause() -> None:
    with RunningServer(fake(error_for="-0", error_at=2)) as server:
        response = server.http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 500})
        assert assert_error(response, 500)["code"] == "pass_failed"
        until(lambda: server.metric("fastblt_num_requests_running") == 0)
        assert server.metric('fastblt_requests_failed_total{cause="pass_failed"}') == 1
        assert server.metric('fastblt_requests_aborted_total{cause="sibling_failed"}') == 1
        # It was taken, so it was not rejected.
        assert "fastblt_requests_rejected_total{" not in server.http.get("/metrics").text
        assert server.metric('fastblt_http_requests_total{handler="/v1/completions",method="POST",status="500"}') == 1


def test_the_load(server: RunningServer) -> None:
    assert server.http.get("/load").json() == {"server_load": 0}


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


def test_connections_send_at_once_what_they_are_given() -> None:
    """Nagle's algorithm and delayed acknowledgements would hold an answer's end back for some 40 ms."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
