"""A Prometheus histogram with weighted observations, which the client library does not have."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Histogram(Collector):
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
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], *self._samples())
        yield family

    def _samples(self) -> tuple[list[tuple[str, int]], float]:
        """The buckets, each with the count up to its bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets, self._sum


class HistogramBySize(Collector):
    """A histogram for each of some classes of sizes: the label `label` is the largest size of a class, or `+Inf`."""

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], label: str, sizes: Sequence[int]
    ) -> None:
        self._family = (name, documentation, [label])
        self._sizes = sizes
        self._parts = {str(size): Histogram(name, documentation, bounds) for size in (*sizes, "+Inf")}

    def observe(self, size: int, value: float) -> None:
        """Enter a value into the class of its size."""
        at = bisect_left(self._sizes, size)
        self._parts[str(self._sizes[at]) if at < len(self._sizes) else "+Inf"].observe(value)

    def collect(self) -> Iterator[Metric]:
        name, documentation, labels = self._family
        family = HistogramMetricFamily(name, documentation, labels=labels)
        for size, part in self._parts.items():
            family.add_metric([size], *part._samples())
        yield family
