"""`fastblt eval`: one command an evaluation. What is heavy is imported inside them."""

from __future__ import annotations

import asyncio

import typer

from benchmarks.evaluation.options import (
    DEFAULT_MODEL,
    DEFAULT_OUTPUT,
    AllowWeak,
    ApiKey,
    BaseUrl,
    Concurrency,
    Limit,
    Model,
    Output,
    Settings,
    Workers,
    clean_errors,
    write,
)

app = typer.Typer(
    help="Judge a model and its decoding methods through a server's endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def humaneval(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    concurrency: Concurrency = 32,
    setting: Settings = None,
    output: Output = DEFAULT_OUTPUT,
    limit: Limit = None,
    max_tokens: int = typer.Option(512, min=1, help="Bytes of a completion at most."),
    workers: Workers = 2,
    allow_weak_sandbox: AllowWeak = False,
) -> None:
    """HumanEval, pass@1: programs run in the sandbox."""
    from benchmarks.evaluation import humaneval as task
    from benchmarks.evaluation.code import evaluate
    from benchmarks.evaluation.endpoint import at
    from benchmarks.evaluation.sandbox import Sandbox

    with clean_errors(), Sandbox(workers=workers, allow_weak=allow_weak_sandbox) as sandbox:
        problems = task.problems(limit)
        with at(base_url, model, concurrency) as url:
            result = asyncio.run(
                evaluate(
                    "humaneval",
                    url,
                    api_key,
                    concurrency,
                    setting,
                    task.jobs(problems, max_tokens),
                    {problem.name: problem.program for problem in problems},
                    sandbox,
                    output,
                    workers,
                )
            )
        write(output, "humaneval", result)


@app.command("sandbox")
def check_sandbox(workers: Workers = 2) -> None:
    """Try what programs are kept from on this machine, and HumanEval's own solutions, right and broken."""
    from benchmarks.evaluation import humaneval as task
    from benchmarks.evaluation.judging import run_programs
    from benchmarks.evaluation.sandbox import PROBES, Sandbox

    with clean_errors(), Sandbox(workers=workers, allow_weak=True) as sandbox:
        for name in PROBES:
            typer.echo(f"{name}: {'NOT STOPPED' if name in sandbox.missing else 'stopped'}")
        problems = task.problems()
        for kind, program in (("canonical", task.Problem.solved), ("broken", task.Problem.broken)):
            verdicts = run_programs(sandbox, {problem.name: program(problem) for problem in problems}, workers)
            passed = sum(verdict.passed for verdict in verdicts.values())
            typer.echo(f"{kind} solutions of HumanEval: {passed} of {len(problems)} pass")
        if sandbox.missing:
            raise typer.Exit(1)
