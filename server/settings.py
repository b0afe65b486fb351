"""Settings of an engine, with defaults that suit the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fastblt.server.request import DecodingParams

#: The checkpoint that ships with the package.
PRETRAINED = Path(__file__).resolve().parent.parent / "models" / "pretrained"


def _check_ranges(settings: object, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError that names a field outside of its range. None, where a field may be None, is left alone."""
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        # Not a number is in no range.
        if value is not None and not least <= value <= most:
            shown = value if abs(value) < 1e18 or isinstance(value, float) else "a far larger number"
            raise ValueError(f"{name} must be from {least} to {most}, not {shown}")


#: A year: longer than anybody waits, short enough for every clock.
_LONGEST_SECONDS = 3.2e7


@dataclass(frozen=True)
class EngineSettings:
    """Limits and modes of one engine.

    `cache_bytes` is the memory for all page groups together (None: an eighth of the machine's). `max_pass_rows` bounds
    the byte rows of one pass (prefill is cut into chunks that fit). `max_passes_per_beat` is the design's m: decoder
    passes after one upstream pass; 1 never holds. `max_hold_ms` bounds how long a request is held (None: to the end of
    the beat). `deterministic` makes arithmetic independent of batching. `prefix_cache` keeps what
    requests computed for later ones that begin with the same bytes.
    `tensor_parallel_size` is the number of processes, and devices, that the global transformer is split over.
    `decoding` has the fields that requests leave out. `allow_untrained_block_size` is for experiments with the
    diffusion head. Raises ValueError for a number that no engine can run with.
    """

    model: str = str(PRETRAINED)
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    cache_bytes: int | None = None
    page_size: int = 64
    max_running: int = 64
    max_waiting: int = 1024
    max_model_len: int = 32768
    max_pass_rows: int = 2048
    max_passes_per_beat: int = 64
    max_hold_ms: float | None = None
    patching_threshold: float | None = None
    max_patch_length: int | None = None
    deterministic: bool = False
    prefix_cache: bool = True
    threads: int | None = None
    tensor_parallel_size: int = 1
    decoding: DecodingParams = field(default_factory=DecodingParams)
    allow_untrained_block_size: bool = False

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            {
                "cache_bytes": (1, 2**50),
                "page_size": (1, 2**16),
                "max_running": (1, 2**16),
                "max_waiting": (1, 10**6),
                "max_model_len": (1, 2**24),
                "max_pass_rows": (1, 2**20),
                "max_passes_per_beat": (1, 2**20),
                "max_hold_ms": (0, 1000 * _LONGEST_SECONDS),
                "patching_threshold": (-1e9, 1e9),
                "max_patch_length": (0, 2**24),
                "threads": (1, 1024),
                "tensor_parallel_size": (1, 1024),
            },
        )


class FailurePolicy(StrEnum):
    """What a server does whose engine died: go on answering 503, exit with status 1, or start another engine."""

    STAY = "stay"
    EXIT = "exit"
    RESTART = "restart"


@dataclass(frozen=True)
class ServiceSettings:
    """How a server looks after its engine and its requests. All times are in seconds.

    `queue_timeout` is how long a request may wait for its first pass, `request_timeout` how long it may take in all;
    None is no limit. An engine that makes no progress for `stall_timeout` gets no more requests, and after twice that
    time it is killed. An engine without requests is tried with one of the server's own every `probe_interval`.
    """

    queue_timeout: float | None = 600.0
    request_timeout: float | None = 3600.0
    stall_timeout: float = 60.0
    probe_interval: float = 30.0
    on_engine_failure: FailurePolicy = FailurePolicy.STAY

    def __post_init__(self) -> None:
        times = ("queue_timeout", "request_timeout", "stall_timeout", "probe_interval")
        _check_ranges(self, dict.fromkeys(times, (0, _LONGEST_SECONDS)))


class SchedulingPolicy(StrEnum):
    """Who leaves the queue first: who came first, or whose request has the lowest `priority`."""

    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True)
class HttpSettings:
    """What the HTTP server lets in, and what it tells operators.

    Without `api_keys` everybody is let in. `cors_origins` are those of browsers' pages that may ask; none by default.
    Under FCFS no request may have a `priority`.
    `shutdown_timeout` is what running requests have at the end, in seconds. `vllm_metrics` repeats the four gauges that
    gateways and autoscalers read under vLLM's names. `otlp_endpoint` is where traces are sent, as a URL.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FCFS
    tls_certificate: str | None = None
    tls_key: str | None = None
    shutdown_timeout: float = 30.0
    access_log: bool = False
    vllm_metrics: bool = False
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        _check_ranges(self, {"shutdown_timeout": (0, _LONGEST_SECONDS)})
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key must not be empty")
