"""`fastblt serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastblt.server import logs
from fastblt.server.cli.configuration import check_environment, read_config, read_keys, show_config
from fastblt.server.cli.errors import clean_errors, fail
from fastblt.server.cli.options import (
    ACCESS,
    CARE,
    DECODING,
    ENGINE,
    ENGINE_DEFAULTS,
    HTTP_DEFAULTS,
    SERVICE_DEFAULTS,
    WATCH,
    BlockSize,
    CacheSize,
    Confidence,
    Deterministic,
    Device,
    DraftLength,
    DtypeOption,
    EntropyBound,
    EntropyRuleOption,
    MaxModelLen,
    MaxPassRows,
    MaxPatchLength,
    MaxSteps,
    PrefixCache,
    Revision,
    Threads,
    Threshold,
    UnmaskingOption,
    UntrainedBlockSize,
    WeightsOption,
    WeightStorage,
)
from fastblt.server.logs import LogFormat, LogLevel, LogSettings
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import (
    PRETRAINED,
    EngineSettings,
    FailurePolicy,
    HttpSettings,
    SchedulingPolicy,
    ServiceSettings,
)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.", show_default=False)] = str(PRETRAINED),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The model's name for clients; given again, another name for it. Default: that of its folder.",
        ),
    ] = None,
    default_max_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Bytes that a request gets at most which says nothing of max_tokens."),
    ] = HTTP_DEFAULTS.default_max_tokens,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the page at /.")] = HTTP_DEFAULTS.page,
    shutdown_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="What running requests get at the end.")
    ] = HTTP_DEFAULTS.shutdown_timeout,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=read_config,
            metavar="FILE",
            help="TOML file of these options; the command line and environment variables come before it. "
            "Default: none.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Let in only who has this key; may be given again. Better in a file or in FASTBLT_SERVE_API_KEY. "
            "Default: everybody is let in.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of such keys, one a line. Default: none.", rich_help_panel=ACCESS),
    ] = None,
    scheduling_policy: Annotated[
        SchedulingPolicy,
        typer.Option(
            help="Who leaves the queue first: who came first, or, at every client's word, the lowest `priority`.",
            rich_help_panel=ACCESS,
        ),
    ] = SchedulingPolicy.FCFS,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin whose pages browsers may ask from; may be given again. Default: none but this server's own.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PEM file of certificates: serve HTTPS. Default: plain HTTP.", rich_help_panel=ACCESS
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of their private key. Default: none.", rich_help_panel=ACCESS),
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.", rich_help_panel=WATCH)] = False,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged.", rich_help_panel=WATCH)] = (
        LogLevel.INFO
    ),
    log_format: Annotated[
        LogFormat, typer.Option(help="A line of text an event, or of JSON.", rich_help_panel=WATCH)
    ] = LogFormat.TEXT,
    vllm_metrics: Annotated[
        bool,
        typer.Option("--vllm-metrics", help="Repeat what routers read under vLLM's names.", rich_help_panel=WATCH),
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send traces there, such as http://localhost:4318/v1/traces; needs the extra `otel`. Default: none.",
            rich_help_panel=WATCH,
        ),
    ] = None,
    queue_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="What a request may wait for its turn; 0 is no limit.",
            rich_help_panel=CARE,
        ),
    ] = SERVICE_DEFAULTS.queue_timeout or 0.0,
    request_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="What a request may take in all; 0 is no limit.", rich_help_panel=CARE
        ),
    ] = SERVICE_DEFAULTS.request_timeout or 0.0,
    stall_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Time without progress after which /ready is 503; after twice that the engine is killed.",
            rich_help_panel=CARE,
        ),
    ] = SERVICE_DEFAULTS.stall_timeout,
    on_engine_failure: Annotated[
        FailurePolicy,
        typer.Option(help="Go on answering 503, exit, or start another engine.", rich_help_panel=CARE),
    ] = SERVICE_DEFAULTS.on_engine_failure,
    method: Annotated[
        DecodingMethod,
        typer.Option(
            help="How requests are decoded that name no method. This and the settings below are defaults: a request "
            "may choose its own.",
            rich_help_panel=DECODING,
        ),
    ] = DecodingMethod.AUTO,
    block_size: BlockSize = None,
    draft_length: DraftLength = None,
    unmasking: UnmaskingOption = None,
    confidence_threshold: Confidence = None,
    entropy_bound: EntropyBound = None,
    entropy_rule: EntropyRuleOption = None,
    max_steps: MaxSteps = None,
    allow_untrained_block_size: UntrainedBlockSize = False,
    revision: Revision = None,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    weights: WeightsOption = WeightStorage.AUTO,
    cache_size: CacheSize = None,
    max_running: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests in a batch.", rich_help_panel=ENGINE)
    ] = ENGINE_DEFAULTS.max_running,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests in the queue; more get 429.", rich_help_panel=ENGINE)
    ] = ENGINE_DEFAULTS.max_waiting,
    max_model_len: MaxModelLen = ENGINE_DEFAULTS.max_model_len,
    max_pass_rows: MaxPassRows = ENGINE_DEFAULTS.max_pass_rows,
    max_gap_ms: Annotated[
        float,
        typer.Option(
            min=1,
            help="Milliseconds that a pass with prompts takes, about: what others wait for their next byte. Less is "
            "lower latency, more is more throughput.",
            rich_help_panel=ENGINE,
        ),
    ] = ENGINE_DEFAULTS.max_gap_ms,
    max_hold_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            min=0,
            rich_help_panel=ENGINE,
            help="A request that needs the global transformer waits at most so many milliseconds for others to need it "
            "too: 0 is the lowest latency, more is more throughput. Default: until nobody can go on.",
        ),
    ] = ENGINE_DEFAULTS.max_hold_ms,
    patching_threshold: Threshold = None,
    max_patch_length: MaxPatchLength = None,
    deterministic: Deterministic = False,
    prefix_cache: PrefixCache = True,
    threads: Threads = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes, each with a device, that the global transformer is split over: GPUs from --device on.",
            rich_help_panel=ENGINE,
        ),
    ] = ENGINE_DEFAULTS.tensor_parallel_size,
) -> None:
    """Serve a checkpoint behind OpenAI's completions API, and a page that shows how it writes. Without MODEL the
    shipped one is served."""
    import asyncio

    from fastblt.server.api.serve import CertificateError, listen
    from fastblt.server.api.serve import serve as run
    from fastblt.server.api.tracing import TracingUnavailableError
    from fastblt.server.process.client import EngineClient, EngineUnavailableError

    log = LogSettings(log_level, log_format)
    logs.configure(log)
    check_environment(context)
    show_config(context)
    with clean_errors():
        decoding = DecodingParams(
            method=method,
            block_size=block_size,
            draft_length=draft_length,
            unmasking=unmasking,
            confidence_threshold=confidence_threshold,
            entropy_bound=entropy_bound,
            entropy_rule=entropy_rule,
            max_steps=max_steps,
        )
        settings = EngineSettings(
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            weights=weights,
            cache_bytes=cache_size,
            max_running=max_running,
            max_waiting=max_waiting,
            max_model_len=max_model_len,
            max_pass_rows=max_pass_rows,
            max_gap_ms=max_gap_ms,
            max_hold_ms=max_hold_ms,
            patching_threshold=patching_threshold,
            max_patch_length=max_patch_length,
            deterministic=deterministic,
            prefix_cache=prefix_cache,
            threads=threads,
            tensor_parallel_size=tensor_parallel_size,
            decoding=decoding,
            allow_untrained_block_size=allow_untrained_block_size,
        )
    if not all(name.strip() for name in served_model_name or ()):
        fail("--served-model-name must not be empty")
    if (tls_certificate is None) != (tls_key is None):
        fail("--tls-certificate and --tls-key need each other")
    for file in (tls_certificate, tls_key):
        # A pipe would be waited for.
        if file is not None and not file.is_file():
            fail(f"cannot serve HTTPS: {file} is no file")
    with clean_errors():
        http = HttpSettings(
            api_keys=read_keys(api_key, api_key_file),
            cors_origins=tuple(cors_origin or ()),
            default_max_tokens=default_max_tokens,
            page=page,
            scheduling_policy=scheduling_policy,
            tls_certificate=str(tls_certificate) if tls_certificate else None,
            tls_key=str(tls_key) if tls_key else None,
            shutdown_timeout=shutdown_timeout,
            access_log=access_log,
            vllm_metrics=vllm_metrics,
            otlp_endpoint=otlp_endpoint,
        )
        service = ServiceSettings(
            queue_timeout=queue_timeout or None,
            request_timeout=request_timeout or None,
            stall_timeout=stall_timeout,
            on_engine_failure=on_engine_failure,
        )
    try:
        sock = listen(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port")
    try:
        names = served_model_name or []
        client = EngineClient(settings, service, name=names[0] if names else None, aliases=names[1:], log=log)
        asyncio.run(run(client, sock, http))
    except TracingUnavailableError as error:
        fail(str(error))
    except CertificateError as error:
        fail(f"cannot serve HTTPS with {tls_certificate} and {tls_key}: {error}")
    except OSError as error:
        fail(f"cannot serve: {error}")
    except EngineUnavailableError as error:
        fail(f"cannot serve {model}: {error}")
