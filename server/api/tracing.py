"""OpenTelemetry traces, an optional extra: one span for each request, from its arrival to its end."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from fastblt.server import logs
from fastblt.server.process.client import LiveRequest
from fastblt.server.request import Delta, FinishReason

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

#: The client's `traceparent` header, while its request is handled.
parent: ContextVar[str | None] = ContextVar("traceparent", default=None)

_NANO = 10**9

#: Seconds to send spans to the collector. Spans that take longer are dropped.
_SEND_SECONDS = 2


class TracingUnavailableError(RuntimeError):
    """The packages of the extra `otel` are not installed."""


class Tracer:
    """Sends spans over OTLP/HTTP to `endpoint`, such as http://localhost:4318/v1/traces, from a background thread.

    Raises TracingUnavailableError if the packages are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingUnavailableError(f"traces need the extra: pip install 'fastblt[otel]' ({error})") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "fastblt"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fastblt")
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, live: LiveRequest, delta: Delta, now: float) -> None:
        """Record the span of a request when its last delta arrives. `now` is a monotonic time in seconds."""
        if delta.finish_reason is None:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        header = live.context.get(parent)
        context = self._propagator.extract({"traceparent": header}) if header else None
        # Our times are monotonic. Spans need wall-clock times.
        offset = time.time() - now
        start = int((live.request.arrival + offset) * _NANO)
        attributes = _attributes(live, delta, now)
        span = self._tracer.start_span("llm_request", context, SpanKind.SERVER, attributes, start_time=start)
        for name, moment in (("scheduled", live.started), ("first byte", live.first)):
            if moment is not None:
                span.add_event(name, timestamp=int((moment + offset) * _NANO))
        if delta.finish_reason is FinishReason.ERROR:
            span.set_status(Status(StatusCode.ERROR, delta.error))
        span.end(int((now + offset) * _NANO))

    async def close(self) -> None:
        """Send the remaining spans."""
        await asyncio.to_thread(self._provider.shutdown)


def _attributes(live: LiveRequest, delta: Delta, now: float) -> dict[str, AttributeValue]:
    """The span's attributes, under OpenTelemetry's names where there are any, and vLLM's for latencies."""
    request, arrival = live.request, live.request.arrival
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.max_tokens": request.params.max_tokens,
        "gen_ai.request.temperature": request.params.temperature,
        "gen_ai.usage.prompt_tokens": len(request.prompt_ids) - 1,
        "gen_ai.usage.completion_tokens": live.bytes + len(delta.ids),
        "gen_ai.response.finish_reasons": [str(delta.finish_reason)],
        "gen_ai.latency.e2e": now - arrival,
    }
    if live.started is not None:
        attributes["gen_ai.latency.time_in_queue"] = live.started - arrival
    first = live.first or (now if delta.ids else None)
    if first is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first - arrival
    if (http_request := live.context.get(logs.request_id)) is not None:
        attributes["http.request.header.x-request-id"] = http_request
    if delta.decoding is not None and delta.decoding.method is not None:
        attributes["fastblt.method"] = str(delta.decoding.method)
    if delta.ledger is not None:
        for name in ("patcher", "encoder", "global_", "decoder"):
            attributes[f"fastblt.nfe.{name.rstrip('_')}"] = getattr(delta.ledger, name)
    return attributes
