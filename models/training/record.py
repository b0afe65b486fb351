"""What made a checkpoint: its runs, where each began, what text it saw, and whose mean the weights are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from fastblt.models.checkpoint_folder import CheckpointError
from fastblt.models.training.files import write_json

RUNS_FILE = "training.json"


class Run(BaseModel):
    """The cost and the settings of a run. It names earlier runs by number, from 1 on, in the list it stands in."""

    began: str = Field(alias="from")
    steps: int
    megabytes: float
    minutes: float
    processor_minutes: float | None
    entropy_minutes: float
    settings: dict[str, Any]


class Corpus(BaseModel):
    """The text of a run. `packages` are all that it and the runs before it saw, with their versions."""

    model_config = ConfigDict(extra="allow")
    packages: dict[str, str] = {}


class Record(BaseModel):
    """The runs behind a checkpoint, each behind those it goes on from, and the text of the last one. `averaged` has the
    shares of the runs whose weights' mean the checkpoint is; empty: it is what the last run made."""

    corpus: Corpus
    runs: list[Run] = Field(min_length=1)
    averaged: dict[PositiveInt, PositiveFloat] = {}

    @model_validator(mode="after")
    def _numbers(self) -> Self:
        for number, run in enumerate(self.runs):
            run.began = run.began.replace("the run before", f"run {number}")
            if not all(1 <= int(old) <= number for old in re.findall(r"\d+", run.began)):
                raise ValueError(f"run {number + 1} goes on from one that does not stand before it")
        if not all(number <= len(self.runs) for number in self.averaged):
            raise ValueError("averaged names a run that is not there")
        return self

    @property
    def shares(self) -> dict[int, float]:
        """Of the runs whose weights the checkpoint consists of."""
        return self.averaged or {len(self.runs): 1.0}

    def write(self, folder: Path) -> None:
        write_json(folder / RUNS_FILE, self.model_dump(by_alias=True, mode="json"))


def read_record(folder: Path) -> Record | None:
    """The record of a checkpoint; None if it has none.

    Raises CheckpointError for a file of that name that neither `fastblt train` nor `fastblt average` wrote.
    """
    path = folder / RUNS_FILE
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except OSError as error:
        reason = str(error)
    raise CheckpointError(f"{path} is none of `fastblt train` ({reason}): remove it") from None


def began(record: Record | None) -> str:
    """Where a run begins that goes on from a checkpoint with this record."""
    if record is None:
        return "weights without a record"
    if len(record.shares) > 1:
        return f"a mean of the weights of runs {listed(list(record.shares))}"
    return f"the weights of run {next(iter(record.shares))}"


def listed(items: Sequence[object]) -> str:
    """1, 2 and 3."""
    return " and ".join(filter(None, (", ".join(map(str, items[:-1])), str(items[-1]))))


def merged(records: Sequence[Record]) -> Record:
    """The record of the mean of checkpoints with these records: every run once, numbered anew, and all packages."""
    runs: list[Run] = []
    averaged: dict[int, float] = {}
    packages: dict[str, str] = {}
    for record in records:
        numbers: list[int] = []
        for run in record.runs:
            own = run.model_copy(update={"began": _renumbered(run.began, numbers)})
            if own not in runs:
                runs.append(own)
            numbers.append(runs.index(own) + 1)
        for number, share in record.shares.items():
            averaged[numbers[number - 1]] = averaged.get(numbers[number - 1], 0.0) + share / len(records)
        packages |= record.corpus.packages
    return Record.model_construct(
        corpus=records[-1].corpus.model_copy(update={"packages": packages}), runs=runs, averaged=averaged
    )


def _renumbered(start: str, numbers: Sequence[int]) -> str:
    return re.sub(r"\d+", lambda old: str(numbers[int(old[0]) - 1]), start)
