from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.bits import windows
from fastblt.models.blt import Blt
from fastblt.models.vocabulary import encode, with_bos


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 1), (4, 3), (100, 100), (1, 1)])
@pytest.mark.parametrize("size", [0, 1, 4, 5, 11, 12])
def test_windows_have_every_byte_once(size: int, length: int, stride: int) -> None:
    data = bytes(range(size))
    pieces = list(windows(data, length, stride))
    assert b"".join(piece[len(piece) - new :] for piece, new in pieces) == data
    assert all(len(piece) <= length and new <= length for piece, new in pieces)
    assert all(new <= stride for _, new in pieces[1:])
    # With less than a whole stride, bytes have what they can have before them.
    assert all(len(piece) == min(length, size) or stride == length or piece is pieces[-1][0] for piece, _ in pieces)


@pytest.mark.parametrize("stride", [0, 5])
def test_strides_that_do_not_fit(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        list(windows(b"abc", 4, stride))


def direct_bits(model: Blt, data: bytes, length: int, stride: int) -> float:
    total = 0.0
    for piece, new in windows(data, length, stride):
        ids = with_bos(encode(piece))
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        total += math.fsum(float(rows[at - 1][ids[at]]) for at in range(len(ids) - new, len(ids)))
    return -total / math.log(2)


def test_bits_are_the_model_s(url: str, model: Blt, tmp_path: Path) -> None:
    texts = {"text.py": b"def f(x):\n    return x\n" * 9, "bytes.bin": bytes(range(256)), "empty": b""}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    files = [str(tmp_path / name) for name in texts]
    for length, stride in ((64, 64), (64, 16)):
        output = tmp_path / f"{length} {stride}"
        options = ["--base-url", url, "--length", str(length), "--stride", str(stride), "--output", str(output)]
        result = CliRunner().invoke(app, ["eval", "bits", *files, *options])
        assert result.exit_code == 0, result.output
        found = json.loads((output / "bits.json").read_text())
        for name, data in texts.items():
            row = found["texts"][str(tmp_path / name)]
            assert row["bytes"] == len(data)
            assert row["bits"] == pytest.approx(direct_bits(model, data, length, stride), abs=0.01)
        assert found["all"]["bytes"] == sum(map(len, texts.values()))
        assert found["all"]["bits_per_byte"] == pytest.approx(found["all"]["bits"] / found["all"]["bytes"])


def test_too_long_a_window_is_said(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    options = ["--base-url", url, "--length", "100000", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", "bits", str(tmp_path / "file"), *options])
    assert result.exit_code == 1 and "--length" in result.output and "4094" in result.output
