from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.checks.constraints import SCHEMAS, app, check_schemas, check_utf8
from fastblt.models.blt import Blt
from fastblt.server.engine.constraints.constraint import Constraint


def test_the_schemas_are_schemas() -> None:
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_are_valid_and_equal_in_every_setting(model: Blt, temperature: float) -> None:
    for name, checked in check_schemas(model, 2, temperature).items():
        assert (checked.outputs, checked.valid, checked.equal) == (2, 2, 2), (name, checked.failures)


def test_masks_that_are_left_out_are_found_out(model: Blt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constraint, "along", lambda self, draft: [None] * (len(draft) + 1))
    assert all(checked.valid == 0 and checked.failures for checked in check_schemas(model, 2, 1.0).values())
    tallies = check_utf8(model, 8).values()
    assert any(tally.decoded < tally.outputs for tally in tallies)


def test_the_command(checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "constraints.json"
    sizes = ["--outputs", "0", "--utf8", "6", "--repeats", "0"]
    answer = CliRunner().invoke(app, ["--model", checkpoint, *sizes, "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    assert json.loads(file.read_text())["utf8"]["blt-d"]["decoded"] == 6
