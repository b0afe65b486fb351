"""What made a checkpoint: its runs in the order of time, where each began, and the text of the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastblt.models.checkpoint_folder import CheckpointError

RUNS_FILE = "training.json"

#: {"corpus": {...}, "runs": [{"from": ..., ...}, ...], "averaged": [numbers]}. Runs are numbered from 1 on; `averaged`
#: are those whose weights' mean the checkpoint is.
Record = dict[str, Any]


def read_record(folder: Path) -> Record | None:
    """The record of a checkpoint, with the number of the run before in place of "the run before"; None if it has none.

    Raises CheckpointError for a file of that name that `fastblt train` and `fastblt average` did not write.
    """
    path = folder / RUNS_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        runs = [
            run | {"from": run["from"].replace("the run before", f"run {number}")}
            for number, run in enumerate(record["runs"])
        ]
        packages = dict(record["corpus"].get("packages", {}))
        averaged = list(record.get("averaged", []))
        named = [(int(old), number) for number, run in enumerate(runs) for old in re.findall(r"\d+", run["from"])]
        if not all(1 <= old <= last for old, last in [*named, *((number, len(runs)) for number in averaged)]):
            raise ValueError("it names runs that it has not")
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is none of `fastblt train` ({error!r}): remove it") from None
    return {"corpus": record["corpus"] | {"packages": packages}, "runs": runs, "averaged": averaged}


def began(record: Record | None) -> str:
    """Where a run begins that goes on from a checkpoint with this record."""
    if record is None or not record["runs"]:
        return "weights without a record"
    if record["averaged"]:
        return f"the mean of the weights of runs {listed(record['averaged'])}"
    return f"the weights of run {len(record['runs'])}"


def listed(numbers: Sequence[int]) -> str:
    """1, 2 and 3."""
    return " and ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def merged(records: Sequence[Record]) -> Record:
    """The record of the mean of checkpoints with these records: every run once, numbered anew, and all packages."""
    runs: list[dict[str, Any]] = []
    averaged: list[int] = []
    for record in records:
        numbers: list[int] = []
        for run in record["runs"]:
            named = run | {"from": _renumbered(run["from"], numbers)}
            if named not in runs:
                runs.append(named)
            numbers.append(runs.index(named) + 1)
        averaged += [numbers[number - 1] for number in record["averaged"]] or numbers[-1:]
    packages = {name: version for record in records for name, version in record["corpus"]["packages"].items()}
    return {"corpus": records[-1]["corpus"] | {"packages": packages}, "runs": runs, "averaged": averaged}


def _renumbered(start: str, numbers: Sequence[int]) -> str:
    return re.sub(r"\d+", lambda old: str(numbers[int(old[0]) - 1]), start)
