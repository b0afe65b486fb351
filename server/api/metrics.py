"""Prometheus metrics: vLLM's names under the prefix `fastblt_`. A token is a byte; times are seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.client import Life
from server.engine.stats import EngineStats
from server.request import Delta, FinishReason

_FIRST_BYTE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_WHOLE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
# Bytes come faster than tokens, and several at once.
_BETWEEN = (5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram(Collector):
    """A histogram whose observations have a weight, which the client library's have not."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += weight
        self._sum += value * weight

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets, self._sum)
        yield family


class Metrics:
    """The metrics of one app. `stats` gives the engine's snapshot, or None while there is none."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self.rejected = Counter(
            "fastblt_requests_rejected", "Requests answered with an error, by cause", ["cause"], registry=self._registry
        )
        self._finished = Counter(
            "fastblt_request_success",
            "Requests that the engine took and that ended, by how",
            ["finished_reason"],
            registry=self._registry,
        )
        for reason in FinishReason:
            self._finished.labels(finished_reason=reason)
        self._first = Histogram("fastblt_time_to_first_token_seconds", "From arrival to the first byte", _FIRST_BYTE)
        self._between = Histogram(
            "fastblt_inter_token_latency_seconds", "Time between bytes; k bytes at once count k times", _BETWEEN
        )
        self._whole = Histogram("fastblt_e2e_request_latency_seconds", "From arrival to the end", _WHOLE)
        for collector in (self._first, self._between, self._whole, _EngineCollector(stats)):
            self._registry.register(collector)

    def observe(self, life: Life, delta: Delta, now: float) -> None:
        """Record a delta as it reaches the front."""
        if delta.ids:
            since = now - life.latest
            if life.first is None:
                self._first.observe(since)
            else:
                self._between.observe(since / len(delta.ids), len(delta.ids))
        if delta.finish_reason is not None:
            self._finished.labels(finished_reason=delta.finish_reason).inc()
            self._whole.observe(now - life.request.arrival)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when they are scraped, so that its loop does nothing for them."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # Otherwise registration would scrape.

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        ledger = stats.ledger
        yield gauge("fastblt_num_requests_running", "Requests in the running batch", value=stats.running)
        yield gauge("fastblt_num_requests_waiting", "Requests in the queue", value=stats.waiting)
        yield _labeled(gauge("fastblt_cache_pages", "Cache pages by group", labels=["group"]), stats.pages_total)
        yield _labeled(gauge("fastblt_cache_pages_free", "Free pages by group", labels=["group"]), stats.pages_free)
        usage = [1.0 - stats.pages_free.get(group, 0) / total for group, total in stats.pages_total.items() if total]
        yield gauge(
            "fastblt_kv_cache_usage_perc", "Share of the fullest group in use, 0 to 1", value=max(usage, default=0)
        )
        yield counter("fastblt_prompt_tokens", "Prompt bytes", value=stats.bytes_prompt)
        yield counter("fastblt_generation_tokens", "Generated bytes", value=stats.bytes_generated)
        yield counter("fastblt_num_preemptions", "Requests put back into the queue", value=stats.preemptions)
        yield counter("fastblt_passes", "Decoder passes", value=stats.passes)
        yield counter("fastblt_beats", "Beats: upstream passes with the decoder passes after them", value=stats.beats)
        modules = {
            "patcher": ledger.patcher,
            "encoder": ledger.encoder,
            "global": ledger.global_,
            "decoder": ledger.decoder,
        }
        yield _labeled(counter("fastblt_nfe", "Forward passes by module, shared ones once", labels=["module"]), modules)
        yield counter("fastblt_rounds", "Drafts with their verification, and blocks", value=ledger.rounds)
        yield counter("fastblt_denoising_steps", "Denoising steps of blocks", value=ledger.steps)
        yield counter("fastblt_patches", "Patches begun in the output of ended requests", value=ledger.patches)
        yield counter("fastblt_patched_tokens", "Bytes of that output in known patches", value=ledger.patched_bytes)
        yield counter("fastblt_spec_decode_num_drafts", "Verified drafts", value=stats.drafts)
        yield counter("fastblt_spec_decode_num_draft_tokens", "Drafted bytes", value=ledger.drafted)
        yield counter("fastblt_spec_decode_num_accepted_tokens", "Drafted bytes accepted", value=ledger.accepted)
        positions = {str(position): count for position, count in enumerate(stats.accepted_by_position)}
        yield _labeled(
            counter(
                "fastblt_spec_decode_num_accepted_tokens_per_pos",
                "Drafted bytes accepted, by their position in the draft",
                labels=["position"],
            ),
            positions,
        )
        yield counter("fastblt_wasted_tokens", "Bytes decoded past a request's end", value=ledger.wasted)


def _labeled(family: Metric, values: dict[str, int]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)  # type: ignore[attr-defined]
    return family
