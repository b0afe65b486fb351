"""pass@1 of completions that are programs: each is run in the sandbox, once, and its verdict kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from fastblt.benchmarks.evaluation.completions import bar
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.evaluation.sandbox import Sandbox, Verdict


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
