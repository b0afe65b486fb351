"""The published curve and runs that follow it or do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastblt.models.training import curve


def write_run(work: Path, points: list[dict[str, float]], sha256: str = "a") -> None:
    (work / "blt").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    (work / "blt" / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (work / "data" / "corpus.json").write_text(json.dumps({"sha256": sha256}))


def points(factor: float = 1.0, steps: int = 400) -> list[dict[str, float]]:
    return [
        {"step": step, "seconds": 1.0, "bits": factor * 2.0, "masked": 3.0, "masked_nats": 2.5, "loss": 4.0}
        for step in range(20, steps + 1, 20)
    ]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.009, 0), (0.989, 1)])
def test_a_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, code: int) -> None:
    monkeypatch.setattr(curve, "PUBLISHED", tmp_path / "published.json")
    write_run(tmp_path / "one", points())
    assert curve.main([str(tmp_path / "one"), "--publish"]) == 0
    assert [point["step"] for point in json.loads(curve.PUBLISHED.read_text())["points"]] == list(range(20, 201, 20))
    write_run(tmp_path / "other", points(factor, steps=200))
    assert curve.main([str(tmp_path / "other")]) == code


@pytest.mark.parametrize(("steps", "sha256", "says"), [(200, "b", "text"), (180, "a", "no points")])
def test_no_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, sha256: str, says: str) -> None:
    monkeypatch.setattr(curve, "PUBLISHED", tmp_path / "published.json")
    write_run(tmp_path / "one", points())
    curve.main([str(tmp_path / "one"), "--publish"])
    write_run(tmp_path / "other", points(steps=steps), sha256)
    with pytest.raises(SystemExit, match=says):
        curve.main([str(tmp_path / "other")])
