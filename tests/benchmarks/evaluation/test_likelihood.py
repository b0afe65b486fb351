"""lm-evaluation-harness on a local file in ARC's format, against the model itself (`make compat` installs it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.benchmarks.evaluation.likelihood import loglikelihood
from fastblt.models.blt import Blt

pytest.importorskip("lm_eval", reason="in the extra `harness`")

ROWS = [
    {"question": "Which is a color?", "choices": {"text": ["blue", "seven"], "label": ["A", "B"]}, "answerKey": "A"},
    {
        "question": "2 + 2 =",
        "choices": {"text": ["four", "naïve 👋", "5", "x"], "label": list("1234")},
        "answerKey": "1",
    },
    {"question": "é" * 30, "choices": {"text": ["\x7f", "e e"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "", "choices": {"text": ["nothing", "a"], "label": ["A", "B"]}, "answerKey": "B"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_harness_s_likelihoods_are_the_model_s(url: str, model: Blt, data: Path, tmp_path: Path) -> None:
    from fastblt.benchmarks.evaluation.likelihood import local_task, run

    folder = tmp_path / "tasks"
    folder.mkdir()
    name = local_task(data, folder)
    result = run(url, Target(url, "", concurrency=2), [name], folder, local=True, samples=True)
    right, by_length = 0, 0
    for row, sample in zip(ROWS, result["samples"][name], strict=True):
        context = f"Question: {row['question']}\nAnswer:"
        texts = row["choices"]["text"]
        scores = [loglikelihood(model, context, f" {text}") for text in texts]
        assert [float(value) for [(value, _)] in sample["resps"]] == pytest.approx(scores, abs=1e-4)
        answer = row["choices"]["label"].index(row["answerKey"])
        right += max(range(len(texts)), key=lambda at: scores[at]) == answer
        by_length += max(range(len(texts)), key=lambda at: scores[at] / len(texts[at])) == answer
    assert result["results"][name]["acc,none"] == right / 4
    assert result["results"][name]["acc_norm,none"] == by_length / 4


def test_the_command(url: str, data: Path, tmp_path: Path) -> None:
    command = ["eval", "likelihood", "--file", str(data), "--base-url", url, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "| local_few |" in result.output and "| 4 |" in result.output
    found = json.loads((tmp_path / "likelihood.json").read_text())
    # What was asked is kept, and gives the same again.
    assert any((tmp_path / "likelihood").glob("answers of*"))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "likelihood.json").read_text())["results"] == found["results"]


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"question": "", "choices": {"text": [], "label": []}, "answerKey": "A"}\n']
)
def test_other_files(url: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    command = ["eval", "likelihood", "--file", str(tmp_path / "bad.jsonl"), "--base-url", url]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path)])
    assert result.exit_code == 1 and "ARC's format" in result.output
