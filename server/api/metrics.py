"""Prometheus metrics: vLLM's names under the prefix `fastblt_`. A token is a byte; times are seconds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest

from fastblt.server.api.engine_metrics import EngineCollector
from fastblt.server.api.errors import ApiError
from fastblt.server.api.histogram import Histogram, HistogramBySize
from fastblt.server.process.client import EngineClient, LiveRequest
from fastblt.server.request import DecodingMethod, Delta, ErrorCode, FinishReason

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
# Bytes come faster than tokens, and several at once.
_BETWEEN = (5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LENGTHS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
#: Classes of prompts by their bytes.
_PROMPT_CLASSES = (256, 2048, 16384)
_SMALL_NUMBERS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


class Metrics:
    """The metrics of one app around `client`."""

    def __init__(self, client: EngineClient, *, vllm_names: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._http = self._counter("http_requests", "HTTP requests answered", ["method", "handler", "status"])
        self._http_seconds = self._histogram("http_request_duration_seconds", "From an HTTP request to its end", _LONG)
        self._rejected = self._counter("requests_rejected", "Requests that the engine did not get, by cause", ["cause"])
        self._finished = self._counter(
            "request_success", "Requests that the engine took and that ended, by how", ["finished_reason"]
        )
        self._failed = self._counter("requests_failed", "Those of them that ended in an error, by cause", ["cause"])
        self._aborted = self._counter("requests_aborted", "Those of them that were aborted, by cause", ["cause"])
        self._corrupted = self._counter("corrupted_requests", "Those of them whose logits were not finite", [])
        self._method_requests = self._counter("method_requests", "Ended requests by the method that ran", ["method"])
        self._method_bytes = self._counter("method_tokens", "Bytes of their output", ["method"])
        self._method_passes = self._counter("method_passes", "Decoder passes that they had a part in", ["method"])
        for reason in FinishReason:
            self._finished.labels(finished_reason=reason)
        for code in ErrorCode:
            self._failed.labels(cause=code)

        histogram = self._histogram
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first pass", _SHORT)
        self._in_vain = histogram("rejected_queue_time_seconds", "What requests waited that had no turn", _LONG)
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first byte", _SHORT)
        self._first_by_prompt = HistogramBySize(
            "fastblt_time_to_first_token_by_prompt_seconds",
            "The same by the length of the prompt",
            _SHORT,
            "prompt_tokens_le",
            _PROMPT_CLASSES,
        )
        self._registry.register(self._first_by_prompt)
        self._between = histogram("inter_token_latency_seconds", "Between bytes; k bytes count k times", _BETWEEN)
        self._per_byte = histogram("request_time_per_output_token_seconds", "Mean of a request's bytes", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end", _LONG)
        self._inference = histogram("request_inference_time_seconds", "From the first pass to the end", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "From the first pass to the first byte", _SHORT)
        self._decode = histogram("request_decode_time_seconds", "From the first byte to the end", _LONG)
        self._prompt = histogram("request_prompt_tokens", "Bytes of a prompt", _LENGTHS)
        self._output = histogram("request_generation_tokens", "Bytes of a completion", _LENGTHS)
        self._asked = histogram("request_params_max_tokens", "max_tokens of a request", _LENGTHS)
        self._patch = histogram("request_bytes_per_patch", "Mean of a completion's patches", _SMALL_NUMBERS)
        self._pass = histogram("request_bytes_per_pass", "Bytes a decoder pass gave a request", _SMALL_NUMBERS)
        self._steps = histogram("request_denoising_steps_per_block", "Mean of a request's blocks", _SMALL_NUMBERS)

        self._registry.register(EngineCollector(client, vllm_names=vllm_names))
        ProcessCollector(namespace="fastblt", registry=self._registry)
        ProcessCollector(namespace="fastblt_engine", pid=lambda: client.pid or "none", registry=self._registry)

    def observe(self, live: LiveRequest, delta: Delta, now: float) -> None:
        """Record a delta when it arrives in the HTTP process. `now` is a monotonic time in seconds."""
        if delta.ids:
            since = now - live.latest
            if live.first is None:
                self._first.observe(since)
                self._first_by_prompt.observe(len(live.request.prompt_ids) - 1, since)
            else:
                self._between.observe(since / len(delta.ids), len(delta.ids))
        if delta.finish_reason is not None:
            self._finish(live, delta, now)

    def count_rejected(self, problem: ApiError, method: str) -> None:
        """Record an answer other than 200 to a request that was meant for the engine."""
        if method == "POST" and not problem.taken:
            self._rejected.labels(cause=problem.code).inc()

    def count_http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Record the end of an HTTP request; `handler` is a route, not a path."""
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._http.labels(method=method, handler=handler, status=status).inc()
        self._http_seconds.observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _finish(self, live: LiveRequest, delta: Delta, now: float) -> None:
        request, arrival = live.request, live.request.arrival
        self._finished.labels(finished_reason=delta.finish_reason).inc()
        if delta.finish_reason is FinishReason.ERROR:
            self._failed.labels(cause=delta.error_code or ErrorCode.PASS_FAILED).inc()
            if delta.error_code is ErrorCode.NOT_FINITE:
                self._corrupted.inc()
        if delta.finish_reason is FinishReason.ABORT:
            self._aborted.labels(cause=live.abort_cause or "shutdown").inc()
        count = live.bytes + len(delta.ids)
        self._whole.observe(now - arrival)
        self._prompt.observe(len(request.prompt_ids) - 1)
        self._output.observe(count)
        self._asked.observe(request.params.max_tokens)
        if live.started is None:
            self._in_vain.observe(now - arrival)
        else:
            self._queue.observe(live.started - arrival)
            self._inference.observe(now - live.started)
        first = live.first or (now if delta.ids else None)
        if first is not None:
            if live.started is not None:
                self._prefill.observe(first - live.started)
            self._decode.observe(now - first)
            if count > 1:
                self._per_byte.observe((now - first) / (count - 1))
        self._account(delta, count)

    def _account(self, delta: Delta, count: int) -> None:
        ledger = delta.ledger
        if ledger is None:
            return
        if delta.decoding is not None:
            method = delta.decoding.method
            self._method_requests.labels(method=method).inc()
            self._method_bytes.labels(method=method).inc(count)
            self._method_passes.labels(method=method).inc(ledger.decoder)
        if ledger.bytes_per_patch is not None:
            self._patch.observe(ledger.bytes_per_patch)
        if ledger.decoder and count:
            self._pass.observe(count / ledger.decoder)
        blocks = delta.decoding is not None and delta.decoding.method in (DecodingMethod.BLT_D, DecodingMethod.BLT_DV)
        if blocks and ledger.rounds:
            self._steps.observe(ledger.steps / ledger.rounds)

    def _counter(self, name: str, documentation: str, labels: list[str]) -> Counter:
        return Counter(f"fastblt_{name}", documentation, labels, registry=self._registry)

    def _histogram(self, name: str, documentation: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"fastblt_{name}", documentation, bounds)
        self._registry.register(histogram)
        return histogram
