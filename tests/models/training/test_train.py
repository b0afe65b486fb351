"""The options of `fastblt train`: what cannot be kept ends in one line, before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.models.checkpoint import save_checkpoint
from fastblt.models.training.train import arguments
from tests.tiny import tiny_model


def save(folder: Path, **overrides: object) -> str:
    shape = {"block_sizes": (4, 8, 16), "max_patch_length": 6, "window": 16}
    save_checkpoint(tiny_model(7, **(shape | overrides)), folder)
    return str(folder)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        arguments(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--from", "nosuch"], "nosuch: no such folder"),
        (["--minutes", "0"], "--minutes: '0' is not a number above 0"),
        (["--minutes", "inf"], "--minutes: 'inf' is not"),
        (["--steps", "1e3"], "--steps: '1e3' is not a whole number from 1"),
        (["--steps", "9" * 5000], "is not a whole number"),
        (["--processes", "0"], "--processes: '0' is not"),
        (["--closed-starts", "1.5"], "--closed-starts: '1.5' is not a number from 0 to 1"),
        (["--closed-starts", "0.7", "--forced-starts", "0.7"], "together at most 1"),
        (["--lr", "nan"], "--lr: 'nan' is not"),
        (["--seed", "-1"], "--seed: '-1' is not"),
        (["--block-sizes", "5"], "--block-sizes must divide 48: 5 does not"),
        (["--length", "1000"], "--length must be a multiple of 128"),
        (["--max-patch-length", "0"], "--max-patch-length: '0' is not"),
    ],
)
def test_what_cannot_be_kept(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refusal(capsys, *argv)


def test_a_checkpoint_decides_what_is_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = save(tmp_path / "start")
    args = arguments(["--from", start])
    assert (args.block_sizes, args.max_patch_length) == ([4, 8, 16], 6)
    args = arguments(["--from", start, "--block-sizes", "8", "12", "--max-patch-length", "6"])
    assert (args.block_sizes, args.max_patch_length) == ([8, 12], 6)
    wrong = refusal(capsys, "--from", start, "--max-patch-length", "9")
    assert "--max-patch-length is 9, but the checkpoint's patches have at most 6 bytes" in wrong


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"block_sizes": ()}, "no diffusion head"),
        ({"max_patch_length": None}, "no max_patch_length"),
        ({"window": None}, "no attention window"),
    ],
)
def test_checkpoints_that_training_cannot_take(
    overrides: dict[str, object], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refusal(capsys, "--from", save(tmp_path / "start", **overrides))
