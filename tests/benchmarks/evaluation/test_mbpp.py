from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.mbpp import jobs, read, split

ROWS = [
    {
        "task_id": number,
        "text": f"Write a function to add {number} to a number. ",
        "code": f"def add_{number}(x):\r\n    return x + {number}",
        "test_list": [
            f"assert add_{number}(1) == {number + 1}",
            f"assert add_{number}(math.floor(2.5)) == {number + 2}",
        ],
        "test_setup_code": "import math",
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 12, 510, 511)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_three_shots(data: Path) -> None:
    examples, test = split(read(data))
    assert [problem.number for problem in examples] == [2, 3, 4]
    assert [problem.number for problem in test] == [11, 12, 510]
    [job, *_] = jobs(examples, test)
    assert isinstance(job.prompt, str)
    assert job.prompt.count("[BEGIN]") == 4 and job.prompt.count("[DONE]") == 3 and job.prompt.endswith("\n[BEGIN]\n")
    assert "add 2 to a number. Your code should pass these tests:\n\nassert add_2(1) == 3\n" in job.prompt
    assert "def add_4(x):\n    return x + 4\n[DONE]\n\nYou are" in job.prompt and "\r" not in job.prompt
    assert "return x + 11" not in job.prompt and job.body == {"max_tokens": 256, "temperature": 0, "stop": ["\n[DONE]"]}


def test_the_sanitized_form(tmp_path: Path, data: Path) -> None:
    rows = [
        {
            "task_id": row["task_id"],
            "prompt": row["text"],
            "code": row["code"],
            "test_imports": ["import math"],
            "test_list": row["test_list"],
        }
        for row in ROWS
    ]
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps(rows, indent=1))
    assert read(path) == read(data)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"task_id": 1, "text": "", "code": ""}'])
def test_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"MBPP"):
        split(read(path))


def test_the_command(url: str, data: Path, tmp_path: Path) -> None:
    proof = CliRunner().invoke(app, ["eval", "mbpp", str(data), "--check"])
    assert proof.exit_code == 0 and "3 of 3 pass, 0 of them broken" in proof.output
    options = ["--base-url", url, "--max-tokens", "8", "--setting", "blt-d-4 a0.7", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", "mbpp", str(data), *options])
    assert result.exit_code == 0, result.output
    assert "| blt-d-4 a0.7 | 0.0 | 0 of 3 |" in result.output
    found = json.loads((tmp_path / "mbpp.json").read_text())["settings"]["blt-d-4 a0.7"]
    assert found["programs"] == 3 and found["decoder_nfe"] > 0
