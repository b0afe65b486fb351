"""Records of what made a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastblt.models.checkpoint_folder import CheckpointError
from fastblt.models.training.record import Record, Run, began, merged, read_record


def run(start: str, steps: int) -> dict[str, Any]:
    costs = {"megabytes": 1.0, "minutes": 2.0, "processor_minutes": None, "entropy_minutes": 0.0}
    return {"from": start, "steps": steps, **costs, "settings": {"seed": steps}}


def on(record: Record, steps: int, package: str = "") -> Record:
    """The record of a run that goes on from a checkpoint with `record`."""
    packages = record.corpus.packages | ({package: "1"} if package else {})
    own = record.corpus.model_copy(update={"packages": packages})
    return Record(corpus=own, runs=[*record.runs, Run.model_validate(run(began(record), steps))])


FIRST = Record.model_validate({"corpus": {"sha256": "a"}, "runs": [run("new weights", 1)]})


def test_means_of_means_name_every_run_once_with_its_share(tmp_path: Path) -> None:
    left, right = on(FIRST, 2, "one"), on(FIRST, 3)
    mean = merged([left, right])
    assert mean.averaged == {2: 0.5, 3: 0.5}
    further, other = on(mean, 4), on(mean, 5, "two")
    last = merged([right, mean, further, other])
    assert [(row.steps, row.began) for row in last.runs] == [
        (1, "new weights"),
        (3, "the weights of run 1"),
        (2, "the weights of run 1"),
        (4, "a mean of the weights of runs 3 and 2"),
        (5, "a mean of the weights of runs 3 and 2"),
    ]
    assert last.averaged == {2: 0.375, 3: 0.125, 4: 0.25, 5: 0.25}
    assert last.corpus.packages == {"one": "1", "two": "1"}
    last.write(tmp_path)
    assert read_record(tmp_path) == last
    assert merged([left, left]).averaged == {2: 1.0}
    assert began(merged([left, left])) == "the weights of run 2"


def test_the_run_before_has_a_number(tmp_path: Path) -> None:
    runs = [run("new weights", 1), run("the weights of the run before", 2), run("the state of the run before", 3)]
    (tmp_path / "training.json").write_text(json.dumps({"corpus": {}, "runs": runs}))
    record = read_record(tmp_path)
    assert record is not None
    assert [row.began for row in record.runs] == ["new weights", "the weights of run 1", "the state of run 2"]
    assert began(record) == "the weights of run 3"
    assert read_record(tmp_path / "none") is None and began(None) == "weights without a record"


@pytest.mark.parametrize(
    "change",
    [
        {"runs": 3},
        {"runs": []},
        {"runs": [{}]},
        {"runs": [run("the weights of run 1", 1)]},
        {"corpus": 3},
        {"corpus": {"packages": ["ab"]}},
        *({"averaged": averaged} for averaged in ({"2": 1.0}, {"0": 1.0}, {"1": 0}, {"x": 1}, [1])),
    ],
)
def test_a_foreign_file_of_that_name_is_told_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    right = {"corpus": {}, "runs": [run("new weights", 1)]}
    (tmp_path / "training.json").write_text(json.dumps(right))
    assert read_record(tmp_path) is not None
    for text in (json.dumps(right | change), "", "[]", "[" * 100_000):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(CheckpointError, match="remove it") as raised:
            read_record(tmp_path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
