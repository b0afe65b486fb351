"""Results as they come, in a file that an interrupted run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JournalError(ValueError):
    """A file of results that this run cannot go on from; the message says what to do."""


class Journal:
    """A file of JSON lines: what the run is, then a record a result, by key. Written at once; each line is whole or,
    after a crash, dropped.

    `run` is all that decides results. Raises JournalError where the file belongs to another run.
    """

    def __init__(self, path: Path, run: Record) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        run = json.loads(json.dumps(run))
        if path.exists() and (lines := self._whole_lines()):
            self._read(lines, run)
        else:
            path.write_text(json.dumps({"run": run}) + "\n")

    def add(self, key: str, record: Record) -> None:
        """Keep a record; it is on the disk when this returns."""
        line = json.dumps({"key": key, **record})
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.records[key] = json.loads(line)

    def _whole_lines(self) -> list[str]:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole)
        return whole.splitlines()

    def _read(self, lines: list[str], run: Record) -> None:
        try:
            before = json.loads(lines[0])["run"]
            records = [json.loads(line) for line in lines[1:]]
            self.records = {record["key"]: record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{self.path} is no file of results; name another folder with --output") from error
        changed = sorted(name for name in before.keys() | run.keys() if before.get(name) != run.get(name))
        if changed:
            raise JournalError(
                f"{self.path} has results of a run with other {', '.join(changed)}; remove it, or name another folder "
                "with --output"
            )


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers: of a run that was interrupted, the time it ran."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
