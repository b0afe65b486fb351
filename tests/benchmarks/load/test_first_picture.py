from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.benchmarks.load.first_picture import measure
from tests.browser.conftest import chromium


def test_a_picture_is_taken_after_the_last_byte(checkpoint: str, tmp_path: Path) -> None:
    if chromium() is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    shot = tmp_path / "page.png"
    for row in measure(model=checkpoint, screenshot=shot).values():
        assert 0 < row["answers_s"] < row["first_byte_s"] < row["whole_s"]
    assert shot.read_bytes().startswith(b"\x89PNG")


def test_no_browser_is_said(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        measure(model=checkpoint)
