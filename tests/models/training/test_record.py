"""Records of what made a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastblt.models.checkpoint_folder import CheckpointError
from fastblt.models.training.record import Record, began, merged, read_record


def run(start: str, steps: int) -> dict[str, Any]:
    return {"from": start, "steps": steps}


def on(record: Record, steps: int, package: str = "") -> Record:
    """The record of a run that goes on from a checkpoint with `record`."""
    packages = record["corpus"]["packages"] | ({package: "1"} if package else {})
    runs = [*record["runs"], run(began(record), steps)]
    return {"corpus": {"sha256": "a", "packages": packages}, "runs": runs, "averaged": []}


FIRST: Record = {"corpus": {"sha256": "a", "packages": {}}, "runs": [run("new weights", 1)], "averaged": []}


def test_means_of_means_name_every_run_once_with_the_runs_it_began_from() -> None:
    left, right = on(FIRST, 2, "one"), on(FIRST, 3)
    mean = merged([left, right])
    assert mean["averaged"] == [2, 3]
    further, other = on(mean, 4), on(mean, 5, "two")
    last = merged([right, further, other])
    assert [(row["steps"], row["from"]) for row in last["runs"]] == [
        (1, "new weights"),
        (3, "the weights of run 1"),
        (2, "the weights of run 1"),
        (4, "the mean of the weights of runs 3 and 2"),
        (5, "the mean of the weights of runs 3 and 2"),
    ]
    assert last["averaged"] == [2, 4, 5]
    assert last["corpus"]["packages"] == {"one": "1", "two": "1"}
    assert merged([mean, FIRST])["averaged"] == [2, 3, 1]


def test_the_run_before_has_a_number(tmp_path: Path) -> None:
    runs = [run("new weights", 1), run("the weights of the run before", 2), run("the state of the run before", 3)]
    (tmp_path / "training.json").write_text(json.dumps({"corpus": {}, "runs": runs}))
    record = read_record(tmp_path)
    assert record is not None
    assert [row["from"] for row in record["runs"]] == ["new weights", "the weights of run 1", "the state of run 2"]
    assert began(record) == "the weights of run 3"
    assert read_record(tmp_path / "none") is None and began(None) == "weights without a record"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"runs": 3, "corpus": {}}', '{"runs": [{}], "corpus": {}}', '{"runs": [], "corpus": 3}'),
        '{"runs": [], "corpus": {}, "averaged": [1]}',
        '{"runs": [{"from": "new"}], "corpus": {}, "averaged": [0]}',
        '{"runs": [{"from": "new"}, {"from": "run 2"}], "corpus": {}}',
    ],
)
def test_a_foreign_file_of_that_name_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match="remove it"):
        read_record(tmp_path)
