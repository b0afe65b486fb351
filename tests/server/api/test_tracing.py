"""Traces as a collector gets them."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings, HttpSettings
from tests.server.api import fake_engine
from tests.server.api.running import RunningServer

Received = "queue.Queue[ExportTraceServiceRequest]"


@pytest.fixture
def collector() -> Iterator[tuple[str, Received]]:
    received: Received = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.put(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_span_a_request(collector: tuple[str, Received]) -> None:
    endpoint, received = collector
    client = EngineClient(EngineSettings(), command=fake_engine.command(error_for="-1"))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"}
    with RunningServer(client, HttpSettings(otlp_endpoint=endpoint, shutdown_timeout=0.0)) as server:
        body = {"prompt": ["Hello", "bad"], "max_tokens": 7, "stream": True}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        server.complete(prompt="Hello", max_tokens=3)
    spans = [
        span
        for request in iter(lambda: received.get(timeout=5) if not received.empty() else None, None)
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    values = [{a.key: a.value for a in span.attributes} for span in spans]
    mine = [i for i, v in enumerate(values) if v["http.request.header.x-request-id"].string_value == "mine"]
    assert len(spans) == 3 and len(mine) == 2
    for i in mine:
        assert (spans[i].trace_id.hex(), spans[i].parent_span_id.hex()) == (trace, parent)
    [other] = [i for i in range(3) if i not in mine]
    assert spans[other].parent_span_id == b"" and spans[other].name == "llm_request"
    assert values[other]["gen_ai.usage.completion_tokens"].int_value == 3
    assert values[other]["gen_ai.usage.prompt_tokens"].int_value == 5
    for span, value in zip(spans, values, strict=True):
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert seconds == pytest.approx(value["gen_ai.latency.e2e"].double_value, abs=1e-3)
    failed = [span for span in spans if span.status.code == 2]
    assert [span.status.message for span in failed] == ["no luck"]


def test_without_a_collector_nothing_is_amiss() -> None:
    client = EngineClient(EngineSettings(), command=fake_engine.command())
    http = HttpSettings(otlp_endpoint="http://127.0.0.1:9/v1/traces", shutdown_timeout=0.0)
    with RunningServer(client, http) as server:
        assert server.complete(prompt="Hello", max_tokens=3)["choices"][0]["text"] == "aaa"


def test_without_the_extra_the_command_says_so() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None; from fastblt.server.cli import app;"
        "sys.argv[1:] = ['serve', '--port', '0', '--otlp-endpoint', 'http://127.0.0.1:9']; app()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "pip install 'fastblt[otel]'" in result.stderr
    assert "Traceback" not in result.stderr
