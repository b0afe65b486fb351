from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastblt.benchmarks.evaluation.publish import Publisher
from fastblt.benchmarks.evaluation.report import page

PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "evaluation"


def test_the_published_page_is_of_the_published_results() -> None:
    text = page(PUBLISHED)
    assert (PUBLISHED / "README.md").read_text() == text
    names = {"humaneval", "quality", "diversity", "bits", "likelihood"}
    assert {path.stem for path in PUBLISHED.rglob("*.json")} == names
    for name in names:
        assert json.loads((PUBLISHED / f"{name}.json").read_text())["made"]
    for chart in ("quality.png", "diversity.png"):
        assert f"]({chart})" in text and (PUBLISHED / chart).read_bytes().startswith(b"\x89PNG")


def test_a_part_is_made_with_its_page(url: str, checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "published"
    Publisher(url, checkpoint, output, tmp_path / "work", 0.02, "bytes_per_processor_second").make("bits")
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "bits.json"]
    text = (output / "README.md").read_text()
    assert text == page(output) and "while other jobs ran" in text and "--scale 0.02" in text
    bits = json.loads((output / "bits.json").read_text())["all"]["bits_per_byte"]
    # Random weights know next to nothing.
    assert f"**{bits:.4f}**" in text and bits > 6
    assert "HumanEval" not in text


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        page(tmp_path)
