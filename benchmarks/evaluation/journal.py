"""A file of results, from which an interrupted run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JournalError(ValueError):
    """This run cannot continue from the file of results. The message says what to do."""


class Journal:
    """A file of JSON lines: a description of the run, then one record with a key for each result.

    Each record is written at once. A last line that a crash cut off is dropped when the file is read. `run` has all
    settings that decide results. Raises JournalError if the file is of another run.
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
        """Add a record. It has been written to the file when this returns."""
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
    """Seconds covered by at least one of the spans (start, end). Interruptions of a run do not count."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
