"""An evaluation of programs: completions of every setting, their verdicts, and a row of a table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fastblt.benchmarks.evaluation.completions import Job, complete_all, cost, digest, key
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.evaluation.judging import judge, run_programs, score
from fastblt.benchmarks.evaluation.sandbox import Sandbox
from fastblt.benchmarks.settings import every_method


class Solved(Protocol):
    """A problem that has a solution."""

    @property
    def name(self) -> str: ...

    def solved(self) -> str: ...

    def broken(self) -> str: ...


def prove(name: str, sandbox: Sandbox, problems: Sequence[Solved]) -> dict[str, int]:
    """How many of a task's own solutions pass, as they are and broken, and say so: a scorer gives all and none."""
    counts = {}
    for kind in ("solved", "broken"):
        programs = {problem.name: getattr(problem, kind)() for problem in problems}
        counts[kind] = sum(verdict.passed for verdict in run_programs(sandbox, programs).values())
    print(f"{name}'s own solutions: {counts['solved']} of {len(problems)} pass, {counts['broken']} of them broken")
    return counts


async def evaluate(
    name: str,
    target: Target,
    settings: Sequence[str] | None,
    jobs: Sequence[Job],
    programs: Mapping[str, Callable[[str], str]],
    sandbox: Sandbox,
    output: Path,
) -> Record:
    """pass@1 and cost by setting; `programs` make a job's completion a program. Raises EndpointError, JournalError."""
    async with target.open() as endpoint:
        served = await endpoint.served()
        settings = list(settings or every_method(served.block_sizes))
        run = {"task": name, "model": vars(served), "jobs": digest(jobs)}
        journal = Journal(output / f"{name}-answers.jsonl", run)
        await complete_all(endpoint, journal, settings, jobs)
    print(f"| {name} | pass@1 % | passed | bytes/s | decoder NFE | global NFE |\n|{'---|' * 6}")
    rows = {}
    for setting in settings:
        keys = [key(setting, job.name) for job in jobs]
        texts = {key(setting, job.name): programs[job.name] for job in jobs}
        judge(journal, sandbox, {k: program(journal.records[k]["text"]) for k, program in texts.items()})
        row = score(journal, keys) | cost([journal.records[k] for k in keys])
        rows[setting] = row
        print(
            f"| {setting} | {100 * row['pass_at_1']:.1f} | {row['passed']} of {row['programs']} "
            f"| {row['bytes_per_second']} | {row['decoder_nfe']} | {row['global_nfe']} |"
        )
    return {"model": vars(served), "settings": rows}
