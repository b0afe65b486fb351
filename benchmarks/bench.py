"""The commands `fastblt bench ...`. Large packages are imported inside the commands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastblt.benchmarks.command import clean_errors
from fastblt.benchmarks.load.names import Dataset, Ramp
from fastblt.benchmarks.machine import measured_with, write_json
from fastblt.server.cli.options import ENGINE_DEFAULTS, Device, DtypeOption, WeightStorage
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import PRETRAINED

app = typer.Typer(help="Measure speed: a server under load, or the engine alone.", no_args_is_help=True)

_ASKED = "What is asked"
_WHEN = "When"
_TRACE = "Trace"
_OUT = "Result"

Result = Annotated[
    Path | None, typer.Option("--json", help="File for the result.", rich_help_panel=_OUT, dir_okay=False)
]
Model = Annotated[str, typer.Option(help="Checkpoint folder or Hub id.", show_default=False)]
Method = Annotated[DecodingMethod, typer.Option(help="How to decode.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of arithmetic. Default: what suits the model.")]
Length = Annotated[int, typer.Option(min=1, help="Bytes of each prompt.")]


@app.command()
def serve(
    base_url: Annotated[str, typer.Option(help="Of any server with OpenAI's /v1/completions.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.", rich_help_panel=_ASKED)] = 100,
    dataset_name: Annotated[Dataset, typer.Option(help="Of prompts.", rich_help_panel=_ASKED)] = Dataset.HELD_OUT,
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            help='A text to cut prompts from, or JSON lines {"prompt", "max_tokens"}.', rich_help_panel=_ASKED
        ),
    ] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Bytes of a prompt.", rich_help_panel=_ASKED)] = None,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to ask for.", rich_help_panel=_ASKED)] = 128,
    prefix_len: Annotated[
        int, typer.Option(min=0, help="Bytes that synthetic prompts share.", rich_help_panel=_ASKED)
    ] = 0,
    prefixes: Annotated[
        int, typer.Option(min=1, help="How many such beginnings there are.", rich_help_panel=_ASKED)
    ] = 1,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            help='A method, or {"method": ..., ...}; given again, requests are mixed evenly. Default: the server\'s.',
            rich_help_panel=_ASKED,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, rich_help_panel=_ASKED)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for the whole length.", rich_help_panel=_ASKED)] = True,
    extra_body: Annotated[str, typer.Option(help="JSON to put into every request.", rich_help_panel=_ASKED)] = "{}",
    request_rate: Annotated[
        float, typer.Option(help="Requests a second; inf sends all at once.", rich_help_panel=_WHEN)
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; less: bursts; inf: constant.", rich_help_panel=_WHEN)
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="At once; with an infinite rate a closed loop.", rich_help_panel=_WHEN),
    ] = None,
    ramp_up_strategy: Annotated[Ramp | None, typer.Option(help="From the rate on.", rich_help_panel=_WHEN)] = None,
    ramp_up_end_rps: Annotated[
        float | None, typer.Option(help="The rate that a ramp ends with.", rich_help_panel=_WHEN)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Azure LLM inference trace (CSV) to replay.", rich_help_panel=_TRACE, exists=True),
    ] = None,
    trace_first: Annotated[int, typer.Option(min=0, help="Its request to begin with.", rich_help_panel=_TRACE)] = 0,
    trace_rate: Annotated[
        float | None, typer.Option(help="Mean rate to stretch it to. Default: as recorded.", rich_help_panel=_TRACE)
    ] = None,
    prompt_factor: Annotated[float, typer.Option(help="Of prompts' sizes.", rich_help_panel=_TRACE)] = 1.0,
    output_factor: Annotated[float, typer.Option(help="Of outputs' sizes.", rich_help_panel=_TRACE)] = 1.0,
    max_prompt_bytes: Annotated[int | None, typer.Option(min=1, rich_help_panel=_TRACE)] = None,
    max_output_bytes: Annotated[int | None, typer.Option(min=1, rich_help_panel=_TRACE)] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="A service level such as ttft:500, tpot:50, tpob:20 or e2el:5000, in ms; may be given again.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the clock starts.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and the mix.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one request.")] = 600.0,
    json_path: Result = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Load a server, and tell its latencies, throughput and goodput, in bytes."""
    with clean_errors("bench"):
        from fastblt.benchmarks.load.serve import Load, run, table

        load = Load(
            base_url=base_url,
            model=model,
            num_prompts=num_prompts,
            dataset=dataset_name,
            dataset_path=dataset_path,
            input_len=input_len,
            output_len=output_len,
            prefix_len=prefix_len,
            prefixes=prefixes,
            request_rate=request_rate,
            burstiness=burstiness,
            ramp=ramp_up_strategy,
            ramp_end_rate=ramp_up_end_rps,
            max_concurrency=max_concurrency,
            trace=trace,
            trace_first=trace_first,
            trace_rate=trace_rate,
            prompt_factor=prompt_factor,
            output_factor=output_factor,
            max_prompt_bytes=max_prompt_bytes,
            max_output_bytes=max_output_bytes,
            decoding=tuple(decoding or ()),
            temperature=temperature,
            ignore_eos=ignore_eos,
            extra_body=_object(extra_body),
            goodput=tuple(goodput or ()),
            warm_up=warm_up,
            seed=seed,
            timeout=timeout,
        )
        result = run(load, show=not quiet)
        typer.echo(table(result))
        _write(json_path, result)
        if not result["completed"]:
            raise ValueError("no request was answered")


@app.command()
def throughput(
    model: Model = str(PRETRAINED),
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, all at once.")] = 64,
    input_len: Length = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Bytes to decode for each.")] = 128,
    method: Method = DecodingMethod.AUTO,
    max_running: Annotated[int, typer.Option(min=1, help="Requests in a batch.")] = 64,
    threads: Threads = None,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_path: Result = None,
) -> None:
    """How many bytes a second the engine makes, without a server."""
    with _engine_errors():
        from fastblt.benchmarks.load.offline import throughput as run
        from fastblt.benchmarks.load.workload import prompts
        from fastblt.server.llm import LLM

        llm = LLM(
            model, threads=threads, device=device, dtype=dtype, max_running=max_running, prefix_cache=False
        )  # fmt: skip
        texts = [text.encode() for text, _ in prompts(Dataset.HELD_OUT, num_prompts, input_len, seed)]
        result = run(llm, texts, output_len, DecodingParams(method))
        typer.echo(
            f"{result['num_requests']} requests in {result['elapsed_time']:.2f} s: {result['requests_per_second']:.2f} "
            f"requests/s, {result['output_bytes_per_second']:.1f} output bytes/s"
        )
        _write(json_path, result)


#: The repository's own report in a checkout, elsewhere a folder of this one's.
REPORT = Path("docs/benchmarks") if Path("docs/benchmarks").is_dir() else Path("bench-report")


@app.command()
def latency(
    model: Model = str(PRETRAINED),
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    input_len: Length = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Bytes to decode for each.")] = 128,
    method: Method = DecodingMethod.AUTO,
    num_iters: Annotated[int, typer.Option(min=1, help="Times the batch is run.")] = 10,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Times before that.")] = 2,
    threads: Threads = None,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_path: Result = None,
) -> None:
    """How long one batch takes from its prompts to its last byte."""
    with _engine_errors():
        from fastblt.benchmarks.load.offline import latency as run
        from fastblt.benchmarks.load.workload import prompts
        from fastblt.server.llm import LLM

        llm = LLM(
            model, threads=threads, device=device, dtype=dtype, max_running=batch_size, prefix_cache=False
        )  # fmt: skip
        texts = [text.encode() for text, _ in prompts(Dataset.HELD_OUT, batch_size, input_len, seed)]
        result = run(llm, texts, output_len, DecodingParams(method), iterations=num_iters, warm_up=num_iters_warmup)
        shares = ", ".join(f"p{share} {1000 * value:.1f}" for share, value in result["percentiles"].items())
        asked = f"{batch_size} prompts of {input_len} bytes, {output_len} bytes written for each, with {method}"
        typer.echo(
            f"from the prompts to the last byte ({asked}): mean {1000 * result['avg_latency']:.1f} ms ({shares})"
        )
        _write(json_path, result)


@app.command()
def methods(
    model: Model = str(PRETRAINED),
    shape: Annotated[str | None, typer.Option(help="Widen to 1b, 3b or 7b first, in memory.")] = None,
    weights: Annotated[
        WeightStorage, typer.Option(help="How a widened model's weights are kept. auto: as its values need them.")
    ] = WeightStorage.AUTO,
    patcher: Annotated[bool, typer.Option("--patcher", help="Widen the entropy model too.")] = False,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time; may be given again.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    settings: Annotated[str, typer.Option(help="all, headline, or a part of the settings' names.")] = "all",
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts; at least one batch.")] = 8,
    input_len: Length = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Bytes to decode for each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each setting; the median counts.")] = 1,
    threads: Threads = None,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    json_path: Result = None,
) -> None:
    """The paper's tables with seconds beside them: what each method saves, by its passes, by prediction, in time."""
    with _engine_errors():
        from fastblt.benchmarks.prompts import held_out_prompts
        from fastblt.benchmarks.savings.methods import measure
        from fastblt.benchmarks.settings import chosen
        from fastblt.models.checkpoint import load_checkpoint
        from fastblt.models.widen import paper_shape, widen
        from fastblt.server.engine.device.devices import device_of, dtype_of

        place = device_of(device)
        blt = load_checkpoint(model, dtype=dtype_of(dtype, place), device=str(place))
        if shape is not None:
            blt = widen(blt, paper_shape(shape, patcher=patcher), weights)
        result: dict[str, Any] = {
            **measured_with(model),
            "shape": shape,
            "weights": weights.value,
            "temperature": temperature,
        }
        result["batches"] = {}
        for size in batch or [1, 8, 32]:
            typer.echo(f"\nBatch {size}, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}\n")
            result["batches"][str(size)] = measure(
                blt,
                held_out_prompts(max(num_prompts, size), input_len),
                output_len,
                temperature,
                chosen(blt.config.block_sizes, settings),
                batch=size,
                rounds=rounds,
                threads=threads,
            )
            _write(json_path, result)


@app.command("all")
def all_parts(
    folder: Annotated[Path, typer.Argument(help="Of the results, and of the report made from them.")] = REPORT,
    model: Model = str(PRETRAINED),
    traces: Annotated[
        Path | None,
        typer.Option(help="Folder of the Azure LLM inference traces of 2023.", exists=True, file_okay=False),
    ] = None,
    only: Annotated[str, typer.Option(help="Parts whose names contain this.")] = "",
    large: Annotated[bool, typer.Option(help="The widened 1B and 3B shapes too: 6 and 12 GB.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes, to see whether all of it works.")] = False,
) -> None:
    """Run every part of the report that is missing or of another checkpoint, then write the report."""
    with _engine_errors():
        from fastblt.benchmarks.report.parts import Plan
        from fastblt.benchmarks.report.run import run_parts

        run_parts(Plan(model, traces, quick), folder, only=only, large=large, say=typer.echo)
        _report(folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of the results that `bench all` left.", exists=True)] = REPORT,
) -> None:
    """Make one page of HTML, and its charts, from the results."""
    with clean_errors("bench"):
        _report(folder)


def _report(folder: Path) -> None:
    from fastblt.benchmarks.report.page import write_report

    typer.echo(f"wrote {write_report(folder)}")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("--extra-body must be a JSON object")
    return found


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, result)


@contextmanager
def _engine_errors() -> Iterator[None]:
    # This must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with clean_errors("bench"):
        yield
