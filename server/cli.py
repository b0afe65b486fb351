"""The command `fastblt`. Everything heavy is imported inside the commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastblt.server import logs
from fastblt.server.configuration import read_config, read_keys, show_config
from fastblt.server.logs import LogFormat, LogLevel, LogSettings
from fastblt.server.request import DecodingMethod, DecodingParams, EntropyRule, SamplingParams, Unmasking
from fastblt.server.settings import PRETRAINED, EngineSettings, FailurePolicy, HttpSettings, ServiceSettings

app = typer.Typer(
    name="fastblt",
    help="An inference server for Byte Latent Transformers.",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "FASTBLT"},
    add_completion=False,
    pretty_exceptions_enable=False,
)

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def parse_size(text: str) -> int:
    """Bytes of a size such as 512MiB, 2GiB, 1.5G or 1073741824; units are binary. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(text).strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 512MiB, 2GiB or a number of bytes")
    return size


_ENGINE = "Engine"
_SAMPLING = "Sampling"
_DECODING = "Decoding"
_CARE = "Deadlines and failures"
_ACCESS = "Access"
_WATCH = "Logs and metrics"
_DEFAULTS = EngineSettings()
_SERVICE = ServiceSettings()

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=_ENGINE)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of weights and caches.", rich_help_panel=_ENGINE)]
CacheSize = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Memory of all caches, such as 512MiB or 2GiB. Default: an eighth of the machine's.",
        rich_help_panel=_ENGINE,
    ),
]
MaxModelLen = Annotated[
    int, typer.Option(min=1, help="Bytes of prompt and completion together.", rich_help_panel=_ENGINE)
]
MaxPassRows = Annotated[
    int, typer.Option(min=1, help="Rows of one pass; longer prompts go in chunks.", rich_help_panel=_ENGINE)
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Entropy, in nats, above which a patch starts. Default: the checkpoint's.", rich_help_panel=_ENGINE
    ),
]
MaxPatchLength = Annotated[
    int | None, typer.Option(min=0, help="Bytes; 0 is no maximum. Default: the checkpoint's.", rich_help_panel=_ENGINE)
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same bytes in any batch, always.", rich_help_panel=_ENGINE)
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Keep what was computed for requests that begin with the same bytes. Their first byte's time tells that "
        "they do: requests may be kept apart by a cache_salt.",
        rich_help_panel=_ENGINE,
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of arithmetic on CPUs. Default: one a core.", rich_help_panel=_ENGINE)
]
BlockSize = Annotated[int | None, typer.Option(help="Of blt-d and blt-dv, in bytes.", rich_help_panel=_DECODING)]
DraftLength = Annotated[int | None, typer.Option(help="Of blt-s, in bytes.", rich_help_panel=_DECODING)]
UnmaskingOption = Annotated[
    Unmasking | None,
    typer.Option("--unmasking", help="Which positions of a block are filled first.", rich_help_panel=_DECODING),
]
Confidence = Annotated[float | None, typer.Option(help="Of confidence unmasking.", rich_help_panel=_DECODING)]
EntropyBound = Annotated[float | None, typer.Option(help="Of entropy unmasking, in nats.", rich_help_panel=_DECODING)]
EntropyRuleOption = Annotated[
    EntropyRule | None, typer.Option("--entropy-rule", help="Of entropy unmasking.", rich_help_panel=_DECODING)
]
MaxSteps = Annotated[int | None, typer.Option(help="Denoising steps of a block.", rich_help_panel=_DECODING)]
UntrainedBlockSize = Annotated[
    bool,
    typer.Option(
        "--allow-untrained-block-size", help="Take block sizes that were not trained.", rich_help_panel=_DECODING
    ),
]


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.", show_default=False)] = str(PRETRAINED),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="The model's id for clients.")] = None,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds running requests get at the end.")] = 30.0,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=read_config,
            help="TOML file of these options; flags and FASTBLT_SERVE_* variables come before it.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Let in only who has this key; may be given again. Better in a file or FASTBLT_SERVE_API_KEY.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of such keys, one a line.", rich_help_panel=_ACCESS)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages browsers may ask from; may be given again.", rich_help_panel=_ACCESS),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of certificates: serve HTTPS.", rich_help_panel=_ACCESS)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file of their private key.", rich_help_panel=_ACCESS)
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log every request.", rich_help_panel=_WATCH)
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged.", rich_help_panel=_WATCH)] = (
        LogLevel.INFO
    ),
    log_format: Annotated[
        LogFormat, typer.Option(help="A line of text an event, or of JSON.", rich_help_panel=_WATCH)
    ] = LogFormat.TEXT,
    vllm_metrics: Annotated[
        bool,
        typer.Option("--vllm-metrics", help="Repeat what routers read under vLLM's names.", rich_help_panel=_WATCH),
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send traces there, such as http://localhost:4318/v1/traces; needs the extra `otel`.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    queue_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds a request may wait for its turn; 0 is no limit.", rich_help_panel=_CARE),
    ] = _SERVICE.queue_timeout or 0.0,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds a request may take in all; 0 is no limit.", rich_help_panel=_CARE)
    ] = _SERVICE.request_timeout or 0.0,
    stall_timeout: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds without progress after which /ready is 503; after twice that the engine is killed.",
            rich_help_panel=_CARE,
        ),
    ] = _SERVICE.stall_timeout,
    on_engine_failure: Annotated[
        FailurePolicy,
        typer.Option(help="Go on answering 503, exit, or start another engine.", rich_help_panel=_CARE),
    ] = _SERVICE.on_engine_failure,
    method: Annotated[
        DecodingMethod,
        typer.Option(help="Of requests that name none, as are the others here.", rich_help_panel=_DECODING),
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
    device: Device = _DEFAULTS.device,
    dtype: DtypeOption = Dtype.FLOAT32,
    cache_size: CacheSize = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests in a batch.", rich_help_panel=_ENGINE)
    ] = _DEFAULTS.max_running,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests in the queue; more get 429.", rich_help_panel=_ENGINE)
    ] = _DEFAULTS.max_waiting,
    max_model_len: MaxModelLen = _DEFAULTS.max_model_len,
    max_pass_rows: MaxPassRows = _DEFAULTS.max_pass_rows,
    max_hold_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="A request that needs the global transformer waits at most so many milliseconds for others to need it "
            "too: 0 is the lowest latency, more is more throughput. Default: until nobody can go on.",
        ),
    ] = _DEFAULTS.max_hold_ms,
    patching_threshold: Threshold = None,
    max_patch_length: MaxPatchLength = None,
    deterministic: Deterministic = False,
    prefix_cache: PrefixCache = True,
    threads: Threads = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes, each with a device, that the global transformer is split over: GPUs from --device on.",
            rich_help_panel=_ENGINE,
        ),
    ] = _DEFAULTS.tensor_parallel_size,
) -> None:
    """Serve a checkpoint (the shipped one by default) behind OpenAI's completions API."""
    import asyncio

    from fastblt.server.api.serve import listen
    from fastblt.server.api.serve import serve as run
    from fastblt.server.api.tracing import TracingUnavailableError
    from fastblt.server.process.client import EngineClient, EngineUnavailableError

    log = LogSettings(log_level, log_format)
    logs.configure(log)
    show_config(context)
    with _clean_errors():
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
        cache_bytes=cache_size,
        max_running=max_running,
        max_waiting=max_waiting,
        max_model_len=max_model_len,
        max_pass_rows=max_pass_rows,
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
    if (tls_certificate is None) != (tls_key is None):
        _fail("--tls-certificate and --tls-key need each other")
    http = HttpSettings(
        api_keys=read_keys(api_key, api_key_file),
        cors_origins=tuple(cors_origin or ()),
        tls_certificate=str(tls_certificate) if tls_certificate else None,
        tls_key=str(tls_key) if tls_key else None,
        shutdown_timeout=shutdown_timeout,
        access_log=access_log,
        vllm_metrics=vllm_metrics,
        otlp_endpoint=otlp_endpoint,
    )
    try:
        sock = listen(host, port)
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port")
    try:
        service = ServiceSettings(
            queue_timeout=queue_timeout or None,
            request_timeout=request_timeout or None,
            stall_timeout=stall_timeout,
            on_engine_failure=on_engine_failure,
        )
        client = EngineClient(settings, service, name=served_model_name, log=log)
        asyncio.run(run(client, sock, http))
    except TracingUnavailableError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot serve HTTPS with {tls_certificate} and {tls_key}: {error}")
    except EngineUnavailableError as error:
        _fail(f"cannot serve {model}: {error}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub id.", show_default=False)] = str(PRETRAINED),
    max_tokens: Annotated[int, typer.Option(help="Bytes at most.", rich_help_panel=_SAMPLING)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is all.", rich_help_panel=_SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    min_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    seed: Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be given again.", rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING)] = False,
    method: Annotated[
        DecodingMethod, typer.Option(help="How to decode.", rich_help_panel=_DECODING)
    ] = DecodingMethod.AUTO,
    block_size: BlockSize = None,
    draft_length: DraftLength = None,
    unmasking: UnmaskingOption = None,
    confidence_threshold: Confidence = None,
    entropy_bound: EntropyBound = None,
    entropy_rule: EntropyRuleOption = None,
    max_steps: MaxSteps = None,
    allow_untrained_block_size: UntrainedBlockSize = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and forward passes to stderr.")] = False,
    revision: Revision = None,
    device: Device = _DEFAULTS.device,
    dtype: DtypeOption = Dtype.FLOAT32,
    cache_size: CacheSize = None,
    max_model_len: MaxModelLen = _DEFAULTS.max_model_len,
    max_pass_rows: MaxPassRows = _DEFAULTS.max_pass_rows,
    patching_threshold: Threshold = None,
    max_patch_length: MaxPatchLength = None,
    deterministic: Deterministic = False,
    threads: Threads = None,
) -> None:
    """Complete PROMPT on standard output, byte by byte as it comes."""
    _quiet_openmp()
    with _clean_errors():
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=tuple(s.encode("utf-8", "surrogateescape") for s in stop or ()),
            ignore_eos=ignore_eos,
            decoding=DecodingParams(
                method=method,
                block_size=block_size,
                draft_length=draft_length,
                unmasking=unmasking,
                confidence_threshold=confidence_threshold,
                entropy_bound=entropy_bound,
                entropy_rule=entropy_rule,
                max_steps=max_steps,
            ),
        )
        from fastblt.server.llm import LLM

        llm = LLM(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            cache_bytes=cache_size,
            max_running=1,
            max_model_len=max_model_len,
            max_pass_rows=max_pass_rows,
            patching_threshold=patching_threshold,
            max_patch_length=max_patch_length,
            deterministic=deterministic,
            threads=threads,
            allow_untrained_block_size=allow_untrained_block_size,
        )
        _print_stream(llm, prompt.encode("utf-8", "surrogateescape"), params, stats)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the official model.")],
    entropy: Annotated[Path, typer.Argument(help="Folder of its entropy model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Turn the official repositories' checkpoints into one that can be served."""
    with _clean_errors():
        from fastblt.models.convert import convert as run

        run(source, entropy, output)
        typer.echo(f"wrote {output}")


@app.command()
def widen(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write: 6 GB for 1b, 12 GB for 3b.")],
    shape: Annotated[str, typer.Option(help="1b or 3b: the paper's.")] = "1b",
    patcher: Annotated[
        bool, typer.Option("--patcher", help="Widen the entropy model too, to the published one's 100 million weights.")
    ] = False,
) -> None:
    """Widen a checkpoint to a large shape that computes the same: real acceptance at a large model's cost."""
    _quiet_openmp()
    with _clean_errors():
        from fastblt.models.widen import paper_shape, widen_checkpoint

        widen_checkpoint(source, output, paper_shape(shape, patcher=patcher))
        typer.echo(f"wrote {output}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a model; `fastblt train --help` lists the options."""
    _quiet_openmp()
    from fastblt.models.training.train import main as run

    run(context.args)


def main() -> None:
    app()


def _quiet_openmp() -> None:
    # Must be set before torch is imported. Threads that spin while they wait cost their neighbors whole time slices.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _print_stream(llm: Any, prompt: bytes, params: SamplingParams, stats: bool) -> None:
    import time

    from fastblt.models.vocabulary import decode
    from fastblt.server.request import FinishReason

    start, count = time.perf_counter(), 0
    for delta in llm.stream(prompt, params):
        # Bytes and not text: a terminal puts characters together, and a file gets them exactly.
        sys.stdout.buffer.write(decode(delta.ids))
        sys.stdout.buffer.flush()
        count += len(delta.ids)
        if delta.finish_reason is FinishReason.ERROR:
            raise RuntimeError(delta.error)
        if stats and delta.finish_reason is not None:
            seconds = time.perf_counter() - start
            typer.echo(f"\n{count} bytes in {seconds:.2f} s, {count / seconds:.1f} a second; {delta.ledger}", err=True)
    if sys.stdout.isatty():
        typer.echo()


@contextmanager
def _clean_errors() -> Iterator[None]:
    """What a user can cause ends in one line; what only a bug can cause keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> NoReturn:
    typer.echo(f"fastblt: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
