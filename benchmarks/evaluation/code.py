"""pass@1 of completions that are programs: each is run in the sandbox, once, and its verdict kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

from fastblt.benchmarks.evaluation.completions import Job, bar, complete_all, cost, digest, key
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.evaluation.sandbox import Sandbox, Verdict
from fastblt.benchmarks.markdown import Table, percent
from fastblt.benchmarks.settings import every_method


def run_programs(
    sandbox: Sandbox, programs: Mapping[str, str], done: Callable[[str, Verdict], None] | None = None
) -> dict[str, Verdict]:
    """Verdicts by name; `done` hears of each as it falls, in this thread."""
    verdicts = {}
    with ThreadPoolExecutor(sandbox.workers) as pool, bar() as progress:
        task = progress.add_task("programs", total=len(programs))
        futures = {pool.submit(sandbox.run, program): name for name, program in programs.items()}
        for future in as_completed(futures):
            name, verdict = futures[future], future.result()
            verdicts[name] = verdict
            if done is not None:
                done(name, verdict)
            progress.advance(task)
    return verdicts


def judge(journal: Journal, sandbox: Sandbox, programs: Mapping[str, str]) -> None:
    """Run what the journal has no verdict of; `programs` are by the keys of their completions' records."""
    left = {key: program for key, program in programs.items() if _verdict_key(key) not in journal.records}

    def keep(key: str, verdict: Verdict) -> None:
        journal.add(_verdict_key(key), {"passed": verdict.passed, "reason": verdict.reason})

    run_programs(sandbox, left, keep)


def score(journal: Journal, keys: list[str]) -> Record:
    """Share of the completions that passed, and what ended the others, by kind."""
    verdicts = [journal.records[_verdict_key(key)] for key in keys]
    passed = sum(verdict["passed"] for verdict in verdicts)
    reasons = Counter(verdict["reason"].partition(":")[0] for verdict in verdicts if not verdict["passed"])
    return {
        "programs": len(verdicts),
        "passed": passed,
        "pass_at_1": passed / len(verdicts) if verdicts else None,
        "failures": dict(reasons.most_common()),
    }


def _verdict_key(key: str) -> str:
    return f"verdict of {key}"


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
    rows = {}
    table = Table(name, "pass@1 %", "passed", "bytes/s", "decoder NFE", "global NFE")
    for setting in settings:
        keys = [key(setting, job.name) for job in jobs]
        texts = {key(setting, job.name): programs[job.name] for job in jobs}
        judge(journal, sandbox, {k: program(journal.records[k]["text"]) for k, program in texts.items()})
        row = rows[setting] = score(journal, keys) | cost([journal.records[k] for k in keys])
        costs = [str(row[figure]) for figure in ("bytes_per_second", "decoder_nfe", "global_nfe")]
        table.row(setting, percent(row["pass_at_1"], 1), f"{row['passed']} of {row['programs']}", *costs)
    return {"model": vars(served), "settings": rows}
