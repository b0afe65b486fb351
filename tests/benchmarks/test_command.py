from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks import command as module
from fastblt.benchmarks.command import command, compare


def measure(*, sizes: Sequence[int] = (1, 2), passed: bool = True) -> dict[str, Any]:
    """What it is."""
    return {"sizes": list(sizes), "passed": passed}


def other(*, rounds: int = 3) -> dict[str, Any]:
    return {"rounds": rounds}


def test_parameters_are_options(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    answer = CliRunner().invoke(command(measure), ["--sizes", "5", "--sizes", "6", "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    result = json.loads(file.read_text())
    assert result["sizes"] == [5, 6] and {"date", "machine", "versions"} < set(result)
    assert CliRunner().invoke(command(measure), []).exit_code == 0


def test_what_fails_says_so_after_its_result_is_written(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert CliRunner().invoke(command(measure), ["--no-passed", "--json", str(file)]).exit_code == 1
    assert json.loads(file.read_text())["passed"] is False


def test_several_measurements_are_subcommands(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    app = command(measure, other)
    assert CliRunner().invoke(app, ["other", "--rounds", "7", "--json", str(file)]).exit_code == 0
    assert json.loads(file.read_text())["rounds"] == 7
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "measure" in shown and "other" in shown and "What it is." in shown


def checkout(folder: Path, speed: float) -> Path:
    """A repository whose server is a number."""
    package = folder / "src" / "fastblt"
    (package / "benchmarks").mkdir(parents=True)
    (package / "benchmarks" / "wrong.py").touch()
    (package / "__init__.py").touch()
    (package / "server.py").write_text(f"SPEED = {speed}\n")
    return folder


def test_another_checkout_is_measured_by_this_ones_scripts(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = module._mixed(checkout(tmp_path / "there", 2.5), place)
    code = "import fastblt.server, fastblt.benchmarks.command as c; print(fastblt.server.SPEED, c.__name__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == ["2.5", "fastblt.benchmarks.command"], done.stderr


def test_figures_of_two_checkouts_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"there": iter([2.0, 1.0, 3.0]), "here": iter([4.0, 8.0, 4.0])}
    order: list[str] = []

    def run(arguments: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        which = "here" if env["PYTHONPATH"] == str(module._HERE / "src") else "there"
        order.append(which)
        assert arguments[1:6] == ["-P", "-m", "some.module", "--rounds", "1"]
        figures = {"machine": {"cores": 2}, "blt": {"speed": next(speeds[which]), "name": "x", "on": True}, which: 1}
        Path(arguments[-1]).write_text(json.dumps(figures))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", run)
    result = compare("some.module", ["--rounds", "1"], checkout(tmp_path, 1.0), 3)
    assert order == ["there", "here"] * 3
    assert result["figures"] == {"blt, speed": {"against": [2.0, 1.0, 3.0], "here": [4.0, 8.0, 4.0]}}
    assert "| blt, speed | 2 | 4 | 2.00 |" in capsys.readouterr().out


def test_options_of_the_comparison_are_not_the_measurements() -> None:
    given = ["auto", "--against", "../x", "--rounds", "2", "--json=f", "--turns", "3", "--setting", "blt"]
    kept = module._without(given, ("--json", "--against", "--turns"))
    assert kept == ["auto", "--rounds", "2", "--setting", "blt"]


def test_a_checkout_that_cannot_be_measured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: subprocess.CompletedProcess(arguments, 1))
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        compare("some.module", [], checkout(tmp_path, 1.0), 1)
