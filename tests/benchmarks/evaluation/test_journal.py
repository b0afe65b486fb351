from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.benchmarks.evaluation.journal import Journal, JournalError, busy_seconds


def test_it_goes_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.jsonl"
    journal = Journal(path, {"task": "a", "sizes": (1, 2)})
    journal.add("one", {"text": "é\n", "value": 1.5})
    journal.add("two", {"text": ""})
    with path.open("a") as file:
        file.write('{"key": "three", "te')
    again = Journal(path, {"task": "a", "sizes": (1, 2)})
    assert list(again.records) == ["one", "two"]
    assert again.records["one"] == {"key": "one", "text": "é\n", "value": 1.5}
    again.add("three", {})
    assert list(Journal(path, {"task": "a", "sizes": [1, 2]}).records) == ["one", "two", "three"]


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Journal(path, {"task": "a", "limit": 1})
    with pytest.raises(JournalError, match=r"other limit, more; remove it, or .*--output"):
        Journal(path, {"task": "a", "limit": 2, "more": 0})


@pytest.mark.parametrize("text", ["something else\n", "[]\n", '{"run": {}}\n[1]\n', '{"run": {}}\n{}\n'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(JournalError, match="no file of results"):
        Journal(path, {})
    assert path.read_text() == text


def test_a_file_cut_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": {"ta')
    Journal(path, {"task": "a"}).add("one", {})
    assert list(Journal(path, {"task": "a"}).records) == ["one"]


def test_busy_seconds() -> None:
    assert busy_seconds([]) == 0
    assert busy_seconds([(5, 7), (0, 1), (0.5, 2), (6, 6.5), (6, 8)]) == 5
