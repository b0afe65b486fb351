"""Makes the completions of many settings, with a progress bar, and keeps them in a journal."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastblt.benchmarks.evaluation.endpoint import Completion, Endpoint, together
from fastblt.benchmarks.evaluation.journal import Journal, Record, busy_seconds
from fastblt.benchmarks.settings import body


@dataclass(frozen=True)
class Job:
    """One completion to make: its name, unique within a setting, its prompt, and the other fields of the request."""

    name: str
    prompt: str | list[int]
    body: dict[str, Any]


def digest(jobs: Sequence[Job]) -> str:
    """SHA-256 of the jobs, to tell whether two runs have the same."""
    return hashlib.sha256(json.dumps([vars(job) for job in jobs]).encode()).hexdigest()


def bar() -> Progress:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr))


async def complete_all(endpoint: Endpoint, journal: Journal, settings: Sequence[str], jobs: Sequence[Job]) -> None:
    """Make the completions that the journal lacks, setting by setting, all jobs of a setting at once.

    Raises EndpointError.
    """
    with bar() as progress:
        for setting in settings:
            left = [job for job in jobs if key(setting, job.name) not in journal.records]
            task = progress.add_task(setting, total=len(jobs), completed=len(jobs) - len(left))

            async def one(job: Job, setting: str = setting, task: Any = task) -> None:
                fields = job.body | {"decoding": body(setting)}
                journal.add(key(setting, job.name), record(await endpoint.complete(job.prompt, **fields)))
                progress.advance(task)

            await together(map(one, left))


def key(setting: str, name: str) -> str:
    return f"{setting}/{name}"


def record(completion: Completion) -> Record:
    """The journal's record of a completion. `data` has its bytes as Latin-1 characters, since they may not be UTF-8."""
    efficiency = completion.efficiency
    return {
        "text": completion.text,
        "data": completion.data.decode("latin-1"),
        "bytes": completion.bytes,
        "finish_reason": completion.finish_reason,
        "started": completion.started,
        "ended": completion.ended,
        "decoder_nfe": efficiency.get("nfe", {}).get("decoder"),
        "global_nfe": efficiency.get("nfe", {}).get("global"),
        "gb_paper": efficiency.get("gb_paper"),
        "patches": efficiency.get("patches"),
    }


def cost(records: Sequence[Record]) -> Record:
    """The cost of a setting's completions: passes, and bytes per second of the time in which any was running."""
    made = sum(record["bytes"] for record in records)
    seconds = busy_seconds([(record["started"], record["ended"]) for record in records])
    counted = [record for record in records if record["decoder_nfe"] is not None]
    return {
        "completions": len(records),
        "bytes": made,
        "seconds": round(seconds, 3),
        "bytes_per_second": round(made / seconds, 1) if seconds else None,
        "decoder_nfe": _mean(counted, "decoder_nfe"),
        "global_nfe": _mean(counted, "global_nfe"),
        "gb_paper": _mean(counted, "gb_paper"),
    }


def _mean(records: Sequence[Record], name: str) -> float | None:
    return round(sum(record[name] for record in records) / len(records), 4) if records else None
