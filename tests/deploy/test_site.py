"""The documentation as a site: it builds without a warning, and no link of it is dead."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.deploy import site


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raises SystemExit for a warning of mkdocs, which is strict, and for a dead link."""
    folder = tmp_path_factory.mktemp("site")
    site.main(folder)
    return folder


def test_every_page_is_there(built: Path) -> None:
    for page in site.pages():
        name = page.with_suffix("") if page.name != "README.md" else page.parent
        assert (built / name / "index.html").exists(), page


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    text = (built / "index.html").read_text(encoding="utf-8")
    for tag in ("<script src=", "<img src=", 'rel="stylesheet" href='):
        assert f'{tag}"http' not in text and f'{tag.replace("=", "=")}"//' not in text


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<a href="no.html">x</a><a href="#here">y</a><a id="there" href="#there">z</a>'
    )
    assert site.dead_links(tmp_path) == ["index.html: #here", "index.html: no.html"]
