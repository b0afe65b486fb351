"""HumanEval end to end on a tiny model: real server, real sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.humaneval import problems


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", *arguments])
    return result.exit_code, result.output


def test_problems() -> None:
    assert len(problems()) == 164
    [first] = problems(1)
    assert first.prompt in first.solved() and first.solution in first.solved()
    assert first.solved().rstrip().endswith("check(has_close_elements)")
    assert first.solution not in first.broken()


def test_every_method_and_going_on(url: str, tmp_path: Path) -> None:
    options = ["humaneval", "--base-url", url, "--limit", "2", "--max-tokens", "16", "--output", str(tmp_path)]
    settings = ["blt", "blt-s k8", "blt-dv-8 1step", "blt-dsv-8 k16", "blt-d-4 a0.7", "blt-d-8 a0.7"]
    code, output = run(*options, "--setting", "blt")
    assert code == 0 and "| blt | 0.0 | 0 of 2 |" in output
    lines = (tmp_path / "humaneval-answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 + 2
    code, output = run(*options)
    assert code == 0 and all(f"| {name} |" in output for name in settings)
    assert (tmp_path / "humaneval-answers.jsonl").read_text().splitlines()[:5] == lines
    result = json.loads((tmp_path / "humaneval.json").read_text())
    assert list(result["settings"]) == settings and result["model"]["block_sizes"] == [4, 8]
    plain, speculative = result["settings"]["blt"], result["settings"]["blt-s k8"]
    assert plain["programs"] == 2 and sum(plain["failures"].values()) == 2 and plain["pass_at_1"] == 0
    # A pass a byte; a prompt that shares a pass with others may take two.
    assert 0 < plain["bytes"] <= plain["decoder_nfe"] * 2 <= plain["bytes"] + 4 and plain["bytes_per_second"] > 0
    records = {
        r["key"]: r for r in map(json.loads, (tmp_path / "humaneval-answers.jsonl").read_text().splitlines()[1:])
    }
    assert records["blt/HumanEval/0"]["bytes"] == len(records["blt/HumanEval/0"]["data"])
    assert speculative["completions"] == 2


def test_a_passing_completion_is_counted(url: str, tmp_path: Path) -> None:
    """The journal's completion is replaced by the canonical one, as if the model had written it."""
    options = ["humaneval", "--base-url", url, "--limit", "2", "--max-tokens", "8", "--output", str(tmp_path)]
    run(*options, "--setting", "blt")
    path = tmp_path / "humaneval-answers.jsonl"
    head, *records = map(json.loads, path.read_text().splitlines())
    records = [record for record in records if not record["key"].startswith("verdict")]
    for record in records:
        if record["key"] == "blt/HumanEval/0":
            record["text"] = problems(1)[0].solution
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
    code, output = run(*options, "--setting", "blt")
    assert code == 0 and "| blt | 50.0 | 1 of 2 |" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--setting", "magic"], "'magic' is no setting"),
        (["--setting", "blt-d-7 a0.5"], "answered 400"),
        (["--base-url", "http://127.0.0.1:9"], "cannot ask http://127.0.0.1:9"),
    ],
)
def test_clear_errors(url: str, tmp_path: Path, options: list[str], message: str) -> None:
    code, output = run("humaneval", "--base-url", url, "--limit", "1", "--output", str(tmp_path), *options)
    assert code == 1 and message in output and "Traceback" not in output
