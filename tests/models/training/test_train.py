"""The options of `fastblt train`: what cannot be kept ends in one line, before anything is built."""

from __future__ import annotations

import subprocess
import sys
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
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--minutes", "0"], "--minutes: '0' is not a number above 0"),
        (["--minutes", "inf"], "--minutes: 'inf' is not"),
        (["--steps", "1e3"], "--steps: '1e3' is not a whole number from 1"),
        (["--steps", "9" * 5000], "is not a whole number"),
        (["--micro-batches", "0"], "--micro-batches: '0' is not"),
        (["--scale-lr", "head=1"], "--scale-lr: 'head=1' is not PART=FACTOR"),
        (["--scale-lr", "global=x"], "--scale-lr: 'x' is not a number from 0 to 1000"),
        (["--freeze", "patcher"], "--freeze: invalid choice: 'patcher'"),
        (["--freeze", "global"], "--freeze and --keep need the weights of --from"),
        (["--held-out", "2"], "--held-out: '2' is not a number from 0 to 1"),
        (["--closed-starts", "1.5"], "--closed-starts: '1.5' is not a number from 0 to 1"),
        (["--closed-starts", "0.7", "--forced-starts", "0.7"], "together at most 1"),
        (["--lr", "nan"], "--lr: 'nan' is not"),
        (["--lr", "1e30"], "--lr: '1e30' is not 0 or a number from 1e-12 to 10"),
        (["--lr", "0", "--muon-lr", "0"], "--lr and --muon-lr are 0: nothing would be trained"),
        (["--seed", "-1"], "--seed: '-1' is not"),
        (["--block-sizes", "5"], "--block-sizes must divide 48: 5 does not"),
        (["--length", "1000"], "--length must be a multiple of 128"),
        (["--max-patch-length", "0"], "--max-patch-length: '0' is not"),
    ],
)
def test_what_cannot_be_kept(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refusal(capsys, *argv)


@pytest.mark.parametrize(
    "option",
    [
        *("--held-out", "--bytes-per-patch", "--minutes", "--entropy-minutes", "--masked-weight", "--closed-starts"),
        *("--forced-starts", "--old-latents", "--full-blocks", "--refined-blocks", "--decay", "--distill", "--keep"),
        *("--muon-lr", "--lr", "--scale-lr"),
    ],
)
def test_no_number_is_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What trains nothing, or nothing but NaN, is refused before it takes time."""
    part = "global=" if option == "--scale-lr" else ""
    for text in ("nan", "-nan", "inf", "-inf", "1e30", "1e308", "1e999", "-1", "-1e-9", "", "x", "1,5"):
        assert refusal(capsys, f"{option}={part}{text}").startswith(
            f"fastblt train: argument {option}: '{text}' is not"
        )


def test_a_checkpoint_decides_what_is_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = save(tmp_path / "start")
    args = arguments(["--from", start])
    assert (args.block_sizes, args.max_patch_length) == ([4, 8, 16], 6)
    args = arguments(["--from", start, "--block-sizes", "8", "12", "--max-patch-length", "6"])
    assert (args.block_sizes, args.max_patch_length) == ([8, 12], 6)
    wrong = refusal(capsys, "--from", start, "--max-patch-length", "9")
    assert "--max-patch-length is 9, but the checkpoint's patches have at most 6 bytes" in wrong
    wrong = refusal(capsys, "--from", start, "--freeze", "encoder", "global", "decoder")
    assert "--freeze leaves nothing to train" in wrong
    plain = save(tmp_path / "plain", block_sizes=(), max_patch_length=None, window=None)
    args = arguments(["--from", plain])
    assert (args.block_sizes, args.max_patch_length) == ([4, 8, 16], None)


def test_faults_end_in_one_line_within_a_second(tmp_path: Path) -> None:
    """Before torch is loaded: of the second and more of a process's time that it takes, none is used."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    start = save(tmp_path / "start")
    (tmp_path / "empty").mkdir()
    faults = {
        ("--from", "nosuch"): "nosuch: no such folder",
        ("--from", str(bare)): "patcher_config is missing",
        ("--from", start, "--text", str(tmp_path / "empty")): "no such file, and no folder or glob with files",
        ("--from", start, "--text", "nothing/*.py"): "no such file, and no folder or glob with files",
    }
    for options, message in faults.items():
        script = f"import sys; from fastblt.models.training.train import main; code = main({list(options)!r}); "
        script += "print('torch' in sys.modules); sys.exit(code)"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and ended.stdout == "False\n", ended
        assert message in ended.stderr and ended.stderr.startswith("fastblt train: "), ended.stderr
        assert ended.stderr.count("\n") == 1
