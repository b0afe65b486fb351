"""The tables of the pages are those of the JSON files, and every file stands in a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastblt.benchmarks.report import pages
from fastblt.benchmarks.report.pages import DATA, PAGES, TABLES, files_of, filled, names_on


def test_pages_have_the_figures_of_the_json_files() -> None:
    """`python -m fastblt.benchmarks.report.pages` writes them."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert names_on(text), page.name
        assert filled(text, page) == text, page.name


def test_every_table_is_shown_once() -> None:
    shown = [name for page in PAGES for name in names_on(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(TABLES)


def test_every_json_file_is_named_by_a_table() -> None:
    named = {file for name, table in TABLES.items() if name != "headline" for file in files_of(table)}
    assert named == {str(path.relative_to(DATA)) for path in DATA.rglob("*.json")}


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_figure_changes_the_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of a table's files is changed, some line of it follows; a table of constants would not."""
    page = tmp_path / "docs" / "page.md"
    data = tmp_path / "docs" / "benchmarks"
    shutil.copytree(DATA, data)
    monkeypatch.setattr(pages, "DATA", data)
    before = pages.block(name, page)
    for file in files_of(TABLES[name]):
        path = data / file
        path.write_text(json.dumps(_larger(json.loads(path.read_text()))))
    assert pages.block(name, page) != before


def test_unknown_and_missing_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES[0]
    with pytest.raises(ValueError, match="none of that name"):
        filled("<!-- table: nosuch -->\n<!-- end -->", page)
    monkeypatch.setattr(pages, "DATA", tmp_path)
    with pytest.raises(ValueError, match=r"auto\.json"):
        filled("<!-- table: auto -->\n<!-- end -->", page)


def test_results_of_another_checkpoint_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads((DATA / "front.json").read_text())
    result |= {"checkpoint": {"sha256": "0123456789abcdef"}, "part": {"checkpoint": "0123456789abcdef"}}
    (tmp_path / "front.json").write_text(json.dumps(result))
    monkeypatch.setattr(pages, "DATA", tmp_path)
    assert "an earlier checkpoint" in pages.block("front", PAGES[1])


def _larger(value: object) -> object:
    """The same with every number half as large again."""
    if isinstance(value, dict):
        return {key: _larger(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_larger(one) for one in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value * 3 // 2 + 1 if isinstance(value, int) else value * 1.5
