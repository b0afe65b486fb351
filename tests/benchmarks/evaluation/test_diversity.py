from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.diversity import TOP_P, distinct


def test_distinct() -> None:
    assert distinct(["a", "b", "a", "b"]) == 0.5
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a", "b", "c"], 3) == 1 and distinct([]) == 0 and distinct(["a"], 2) == 0


def test_the_command(url: str, tmp_path: Path) -> None:
    options = ["--base-url", url, "--samples", "2", "--bytes", "40", "--output", str(tmp_path)]
    options += ["--block-size", "4", "--block-size", "8", "--bound", "0.5", "--bound", "1.2"]
    result = CliRunner().invoke(app, ["eval", "diversity", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "diversity.json").read_text())
    points = {(row["setting"], row["top_p"]): row for row in found["points"]}
    settings = ["blt", "blt-d-4 g0.5", "blt-d-4 g1.2", "blt-d-8 g0.5", "blt-d-8 g1.2"]
    assert list(points) == [(setting, top_p) for setting in settings for top_p in TOP_P]
    for (setting, top_p), row in points.items():
        assert 0 < row["type_token_ratio"] <= 1 and 0 <= row["loops"] <= 1 and row["words"] >= 1
        if setting == "blt":
            assert row["decoder_nfe"] == 40
        elif setting.endswith("g0.5"):
            # A higher bound never takes more passes on the same text; texts differ, so on average and roughly.
            assert points[setting.replace("g0.5", "g1.2"), top_p]["decoder_nfe"] <= row["decoder_nfe"] + 2
    assert (tmp_path / "diversity.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "diversity.jsonl").read_text()
    assert CliRunner().invoke(app, ["eval", "diversity", *options]).exit_code == 0
    assert (tmp_path / "diversity.jsonl").read_text() == lines


def test_a_point_is_what_the_endpoint_gives(url: str, tmp_path: Path) -> None:
    options = ["--base-url", url, "--samples", "2", "--bytes", "40", "--output", str(tmp_path)]
    CliRunner().invoke(app, ["eval", "diversity", *options, "--block-size", "4", "--bound", "0.8"])
    row = {(r["setting"], r["top_p"]): r for r in json.loads((tmp_path / "diversity.json").read_text())["points"]}
    decoding = {"method": "blt-d", "block_size": 4, "unmasking": "entropy", "entropy_bound": 0.8}
    ratios, passes = [], []
    for seed in range(2):
        body = {"prompt": [1], "max_tokens": 40, "top_p": 0.9, "seed": seed, "ignore_eos": True, "decoding": decoding}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        words = answer["choices"][0]["text"].split()
        ratios.append(len(set(words)) / len(words))
        passes.append(answer["efficiency"]["nfe"]["decoder"])
    assert row["blt-d-4 g0.8", 0.9]["type_token_ratio"] == pytest.approx(sum(ratios) / 2, abs=0.2)
    assert row["blt-d-4 g0.8", 0.9]["decoder_nfe"] == pytest.approx(sum(passes) / 2, abs=2)
