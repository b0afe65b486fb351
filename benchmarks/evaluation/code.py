"""pass@1 of completions that are programs. Each is run once in the sandbox, and its verdict is kept in the journal."""

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
    """Run programs in parallel; returns verdicts by name. `done` is called with each verdict, in this thread."""
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
    """Run the programs for which the journal has no verdict. `programs` has them by the keys of their completions."""
    left = {key: program for key, program in programs.items() if _verdict_key(key) not in journal.records}

    def keep(key: str, verdict: Verdict) -> None:
        journal.add(_verdict_key(key), {"passed": verdict.passed, "reason": verdict.reason})

    run_programs(sandbox, left, keep)


def score(journal: Journal, keys: list[str]) -> Record:
    """The share of completions that passed, and the kinds of failure of the others."""
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
    """Test the scorer with a task's own solutions. All should pass as they are, and none when broken.

    Prints and returns how many of each passed.
    """
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
    """pass@1 and cost by setting. `programs[job.name]` makes a program of the job's completion.

    Raises EndpointError, JournalError.
    """
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
