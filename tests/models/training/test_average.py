from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.checkpoint_folder import CheckpointError
from fastblt.models.training.average import average
from fastblt.server.cli import app
from tests.models.training.test_record import run
from tests.models.training.toys import toy_model


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three checkpoints of one shape, with records of runs: the second and the third went on from the first."""
    before = "the weights of the run before"
    first, second, third = (run(text, steps) for text, steps in (("new", 1), (before, 2), (before, 3)))
    for seed, runs in enumerate(([first], [first, second], [first, second, third])):
        folder = tmp_path / str(seed)
        save_checkpoint(toy_model(seed), folder, torch.bfloat16)
        record = {"corpus": {"sha256": str(seed), "packages": {f"p{seed}": "1"}}, "runs": runs}
        (folder / "training.json").write_text(json.dumps(record))
    return [str(tmp_path / str(seed)) for seed in range(3)]


def test_every_tensor_is_the_mean_in_its_own_type(folders: list[str], tmp_path: Path) -> None:
    average(folders, tmp_path / "mean")
    *each, mean = (load_file(Path(folder) / "model.safetensors") for folder in (*folders, tmp_path / "mean"))
    for name, tensor in mean.items():
        expected = torch.stack([one[name].double() for one in each]).mean(0).to(tensor.dtype)
        assert tensor.dtype == each[0][name].dtype and torch.equal(tensor, expected)
    assert load_checkpoint(tmp_path / "mean").config == load_checkpoint(folders[0]).config


def test_runs_are_told_once_each_and_by_number(folders: list[str], tmp_path: Path) -> None:
    average(folders, tmp_path / "mean")
    record = json.loads((tmp_path / "mean" / "training.json").read_text())
    assert [run["steps"] for run in record["runs"]] == [1, 2, 3]
    assert [run["from"] for run in record["runs"]] == ["new", "the weights of run 1", "the weights of run 2"]
    assert record["averaged"] == {"1": 1 / 3, "2": 1 / 3, "3": 1 / 3}
    assert record["corpus"] == {"sha256": "2", "packages": {"p0": "1", "p1": "1", "p2": "1"}}


def test_without_records_there_is_none(folders: list[str], tmp_path: Path) -> None:
    average(folders[:2], tmp_path / "mean")
    assert (tmp_path / "mean" / "training.json").exists()
    Path(folders[1], "training.json").unlink()
    average(folders[:2], tmp_path / "mean")
    assert not (tmp_path / "mean" / "training.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": 3, "corpus": {}}'])
def test_another_record_is_refused_before_anything_is_written(text: str, folders: list[str], tmp_path: Path) -> None:
    Path(folders[1], "training.json").write_text(text)
    with pytest.raises(CheckpointError, match="remove it"):
        average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_what_cannot_be_averaged(folders: list[str], tmp_path: Path) -> None:
    save_checkpoint(toy_model(0, hash_group_vocab=32), tmp_path / "other")
    for sources, words in ((folders[:1], "two checkpoints"), ([folders[0], str(tmp_path / "other")], "another ")):
        with pytest.raises(CheckpointError, match=words):
            average(sources, tmp_path / "mean")
        done = CliRunner().invoke(app, ["average", *sources, "--output", str(tmp_path / "mean")])
        assert done.exit_code == 1 and words in done.output and done.output.count("\n") == 1
    assert not (tmp_path / "mean").exists()
