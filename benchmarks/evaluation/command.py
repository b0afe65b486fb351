"""`fastblt eval`, with a command for each evaluation. Large packages are imported inside the commands."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from fastblt.benchmarks.command import clean_errors as clean
from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.machine import write_json
from fastblt.server.cli.options import ENGINE_DEFAULTS, Device, DtypeOption
from fastblt.server.settings import PRETRAINED

app = typer.Typer(
    help="Judge a model and its decoding methods through a server's endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_SERVER = "Server"

BaseUrl = Annotated[
    str | None,
    typer.Option(help="Of a running server. Default: start one of --model and end it.", rich_help_panel=_SERVER),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="FASTBLT_API_KEY", help="Better in FASTBLT_API_KEY.", rich_help_panel=_SERVER),
]
Model = Annotated[
    str, typer.Option(help="Checkpoint folder or Hub id to serve.", show_default=False, rich_help_panel=_SERVER)
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=_SERVER)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", help="Such as 'blt-d-8 a0.7'; may be given again. Default: each method."),
]
Output = Annotated[Path, typer.Option(help="Folder of results; a run that was interrupted goes on from it.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
AllowWeak = Annotated[
    bool,
    typer.Option("--allow-weak-sandbox", help="Run programs even where a protection is missing here."),
]
Workers = Annotated[int, typer.Option(min=1, help="Programs that run at a time.")]

DEFAULT_MODEL = str(PRETRAINED)
DEFAULT_OUTPUT = Path("evaluation")
MaxTokens = Annotated[int, typer.Option(min=1, help="Bytes of a completion at most.")]


def clean_errors() -> AbstractContextManager[None]:
    """Show errors that a user can cause as one line, and exit."""
    return clean("eval", "interrupted; the same command goes on")


def write(folder: Path, name: str, result: Record) -> None:
    """Write a result to `name`.json in the folder."""
    write_json(folder / f"{name}.json", result)


@app.command()
def humaneval(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 32,
    setting: Settings = None,
    output: Output = DEFAULT_OUTPUT,
    limit: Limit = None,
    max_tokens: MaxTokens = 512,
    workers: Workers = 2,
    allow_weak_sandbox: AllowWeak = False,
) -> None:
    """HumanEval, pass@1: programs run in the sandbox."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import humaneval as task
        from fastblt.benchmarks.evaluation.code import evaluate
        from fastblt.benchmarks.evaluation.endpoint import Target
        from fastblt.benchmarks.evaluation.sandbox import Sandbox

        target = Target(base_url, model, api_key, concurrency, device, dtype)
        with Sandbox(workers=workers, allow_weak=allow_weak_sandbox) as sandbox:
            problems = task.problems(limit)
            programs = {problem.name: problem.program for problem in problems}
            jobs = task.jobs(problems, max_tokens)
            result = asyncio.run(evaluate("humaneval", target, setting, jobs, programs, sandbox, output))
        write(output, "humaneval", result)


@app.command()
def mbpp(
    data: Annotated[Path, typer.Argument(help="mbpp.jsonl, or the sanitized .json.")],
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 32,
    setting: Settings = None,
    output: Output = DEFAULT_OUTPUT,
    limit: Limit = None,
    max_tokens: MaxTokens = 256,
    workers: Workers = 2,
    allow_weak_sandbox: AllowWeak = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only run the file's own solutions, right and broken.")
    ] = False,
) -> None:
    """MBPP, 3-shot, pass@1: programs run in the sandbox."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import mbpp as task
        from fastblt.benchmarks.evaluation.code import evaluate, prove
        from fastblt.benchmarks.evaluation.endpoint import Target
        from fastblt.benchmarks.evaluation.sandbox import Sandbox

        examples, test = task.split(task.read(data), limit)
        target = Target(base_url, model, api_key, concurrency, device, dtype)
        with Sandbox(workers=workers, allow_weak=allow_weak_sandbox) as sandbox:
            if check:
                prove("MBPP", sandbox, test)
                return
            programs = {problem.name: problem.program for problem in test}
            jobs = task.jobs(examples, test, max_tokens)
            result = asyncio.run(evaluate("mbpp", target, setting, jobs, programs, sandbox, output))
        write(output, "mbpp", result)


@app.command("sandbox")
def check_sandbox(workers: Workers = 2) -> None:
    """Try what programs are kept from on this machine, and HumanEval's own solutions, right and broken."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import humaneval as task
        from fastblt.benchmarks.evaluation.code import prove
        from fastblt.benchmarks.evaluation.sandbox import PROBES, Sandbox

        with Sandbox(workers=workers, allow_weak=True) as sandbox:
            for name in PROBES:
                typer.echo(f"{name}: {'NOT STOPPED' if name in sandbox.missing else 'stopped'}")
            prove("HumanEval", sandbox, task.problems())
            if sandbox.missing:
                raise typer.Exit(1)


@app.command()
def flores(
    examples: Annotated[tuple[Path, Path], typer.Option(help="Files of source and translation, such as dev's.")],
    test: Annotated[tuple[Path, Path], typer.Option(help="Files of source and translation, such as devtest's.")],
    languages: Annotated[tuple[str, str], typer.Option(help="Their names in the prompt.")] = ("French", "English"),
    tokenizer: Annotated[
        str, typer.Option(help="Of sacrebleu: flores101 is the paper's SentencePiece; 13a and intl need no file.")
    ] = "flores101",
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 32,
    setting: Settings = None,
    output: Output = DEFAULT_OUTPUT,
    limit: Limit = None,
    max_tokens: MaxTokens = 512,
) -> None:
    """Translation, 4-shot, SentencePiece BLEU."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import flores as task
        from fastblt.benchmarks.evaluation.endpoint import Target

        pairs = task.read(*test)[:limit]
        jobs = task.jobs(task.read(*examples), pairs, languages, max_tokens)
        wanted = [pair.target for pair in pairs]
        target = Target(base_url, model, api_key, concurrency, device, dtype)
        write(output, "flores", asyncio.run(task.evaluate(target, setting, jobs, wanted, tokenizer, output)))


@app.command()
def bits(
    files: Annotated[list[Path], typer.Argument(help="Any files; bytes are bytes.")],
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 8,
    output: Output = DEFAULT_OUTPUT,
    length: Annotated[int, typer.Option(min=1, help="Bytes that are read at a time.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="New bytes each time. Default: all of them.")] = None,
) -> None:
    """Bits per byte of files under the causal head."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import bits as task
        from fastblt.benchmarks.evaluation.endpoint import Target

        texts = {str(path): path.read_bytes() for path in files}
        target = Target(base_url, model, api_key, concurrency, device, dtype)
        write(output, "bits", asyncio.run(task.evaluate(target, texts, length, stride, output)))


@app.command()
def likelihood(
    task: Annotated[
        list[str] | None,
        typer.Option(help="Of lm-evaluation-harness, which downloads its data. Default: the paper's five."),
    ] = None,
    file: Annotated[list[Path] | None, typer.Option(help="JSON lines in ARC's format; nothing is downloaded.")] = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 4,
    output: Output = DEFAULT_OUTPUT,
    limit: Limit = None,
) -> None:
    """Multiple choice by likelihood, through lm-evaluation-harness (the extra `harness`)."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import likelihood as harness
        from fastblt.benchmarks.evaluation.endpoint import Target

        target = Target(base_url, model, api_key, concurrency, device, dtype)
        folder = output / "likelihood"
        folder.mkdir(parents=True, exist_ok=True)
        names = [harness.local_task(path, folder) for path in file or ()]
        names += task or ([] if file else list(harness.TASKS))
        with target.running() as url:
            result = harness.run(url, target, names, folder, local=not task and bool(file), limit=limit)
        typer.echo(harness.table(result))
        write(output, "likelihood", result)


@app.command()
def quality(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 32,
    setting: Settings = None,
    output: Output = DEFAULT_OUTPUT,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out places.")] = 1500,
    alone: Annotated[int, typer.Option(min=1, help="Of them, to time one at a time.")] = 32,
    length: Annotated[int, typer.Option("--bytes", min=1, help="Of each completion.")] = 64,
    processor_clock: Annotated[
        bool, typer.Option("--processor-clock", help="Chart the engine's processor time: for machines with other jobs.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="The --output of another checkpoint, to be compared place by place.")
    ] = None,
) -> None:
    """Next lines of held-out code against bytes per second: a table and a chart."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import charts
        from fastblt.benchmarks.evaluation import quality as task
        from fastblt.benchmarks.evaluation.endpoint import Target

        other = json.loads((against / "quality.json").read_text()) if against else None
        target = Target(base_url, model, api_key, concurrency, device, dtype)
        result = asyncio.run(task.evaluate(target, setting, prompts, alone, length, output))
        write(output, "quality", result)
        if other:
            typer.echo(f"\n{task.compare(result, other)}")
        clock = "bytes_per_processor_second" if processor_clock else "bytes_per_second"
        charts.quality(result, output / "quality.png", clock)


@app.command()
def diversity(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    concurrency: Concurrency = 32,
    output: Output = DEFAULT_OUTPUT,
    block_size: Annotated[list[int] | None, typer.Option(help="Default: all that were trained.")] = None,
    bound: Annotated[
        list[float] | None, typer.Option(help="Nats; may be given again. Default: 0.5, 0.8, 1, 1.2.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each point.")] = 8,
    length: Annotated[int, typer.Option("--bytes", min=1, help="Of each sample.")] = 1000,
) -> None:
    """Type-token ratio of unconditional samples against decoder passes: a table and a chart."""
    with clean_errors():
        from fastblt.benchmarks.evaluation import charts
        from fastblt.benchmarks.evaluation import diversity as task
        from fastblt.benchmarks.evaluation.endpoint import Target

        target = Target(base_url, model, api_key, concurrency, device, dtype)
        result = asyncio.run(task.evaluate(target, block_size, bound or task.BOUNDS, samples, length, output))
        write(output, "diversity", result)
        charts.diversity(result, output / "diversity.png")
