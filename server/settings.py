"""Settings of an engine, with defaults that suit the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fastblt.server.request import DecodingParams
from fastblt.server.request.decoding import as_decoding

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

    Raises ValueError for a number that no engine can run with.
    """

    #: Checkpoint folder or Hub id; `revision` is a branch, tag or commit of the latter.
    model: str = str(PRETRAINED)
    revision: str | None = None
    #: cpu, cuda or cuda:N; `dtype` is that of weights and caches. None: float32 on a CPU, bfloat16 on a GPU.
    device: str = "cpu"
    dtype: str | None = None
    #: How a model that does not fit the processor's caches keeps its weights on a CPU: auto (as the checkpoint has
    #: them), float32, bfloat16, float16 or int8. Arithmetic is that of `dtype`, which is float32 then.
    weights: str = "auto"
    #: Memory of all caches together. None: an eighth of the machine's; on a GPU what weights and passes leave of it.
    cache_bytes: int | None = None
    #: Positions (bytes, or patches) of a cache page.
    page_size: int = 64
    #: Requests that run at once, and requests that may wait.
    max_running: int = 64
    max_waiting: int = 1024
    #: Bytes of prompt and completion together, BOS included.
    max_model_len: int = 32768
    #: Rows of one pass at most; longer prompts are computed in chunks.
    max_pass_rows: int = 2048
    #: Milliseconds that a pass with prompts takes, about: what others wait for their next byte, or for their first.
    max_gap_ms: float = 100.0
    #: Decoder passes after one upstream pass, at most; 1 never holds a request.
    max_passes_per_beat: int = 64
    #: Milliseconds that a request is held for the next upstream pass, at most. None: to the end of the beat.
    max_hold_ms: float | None = None
    #: Entropy in nats above which a patch starts, and the longest patch in bytes. None: the checkpoint's.
    patching_threshold: float | None = None
    max_patch_length: int | None = None
    #: Whether a row is computed the same way whatever is batched with it.
    deterministic: bool = False
    #: Whether requests share what earlier ones computed for the same first bytes.
    prefix_cache: bool = True
    #: Threads of arithmetic on a CPU. None: one a core.
    threads: int | None = None
    #: Processes, each with a device, that the global transformer is split over.
    tensor_parallel_size: int = 1
    #: Decoding fields that requests leave out.
    decoding: DecodingParams = field(default_factory=DecodingParams)
    #: Whether block sizes that were not trained are taken, for experiments with the diffusion head.
    allow_untrained_block_size: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoding", as_decoding(self.decoding))
        _check_ranges(
            self,
            {
                "cache_bytes": (1, 2**50),
                "page_size": (1, 2**16),
                "max_running": (1, 2**16),
                "max_waiting": (1, 10**6),
                "max_model_len": (1, 2**24),
                "max_pass_rows": (1, 2**20),
                "max_gap_ms": (1, 1000 * _LONGEST_SECONDS),
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
    """How a server looks after its engine and its requests. All times are in seconds."""

    #: Until the first pass of a request, and for all of it. None: no limit.
    queue_timeout: float | None = 600.0
    request_timeout: float | None = 3600.0
    #: An engine without progress for so long gets no more requests; after twice that it is killed.
    stall_timeout: float = 60.0
    #: An engine without requests is tried so often, with one of the server's own.
    probe_interval: float = 30.0
    #: What follows when the engine is lost.
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
    """What the HTTP server lets in, and what it tells operators."""

    #: Keys that let a request in; without any everybody is let in.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    #: Origins whose pages browsers may ask from; none by default.
    cors_origins: tuple[str, ...] = ()
    #: Under FCFS no request may have a `priority`.
    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FCFS
    #: PEM files; without them the server speaks plain HTTP.
    tls_certificate: str | None = None
    tls_key: str | None = None
    #: Seconds that running requests get at the end.
    shutdown_timeout: float = 30.0
    access_log: bool = False
    #: Whether the four gauges that gateways and autoscalers read are repeated under vLLM's names.
    vllm_metrics: bool = False
    #: `max_tokens` of requests that name none.
    default_max_tokens: int = 16
    #: Whether the page at / is served.
    page: bool = True
    #: URL to send traces to.
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        _check_ranges(self, {"shutdown_timeout": (0, _LONGEST_SECONDS), "default_max_tokens": (1, 2**24)})
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key must not be empty")
