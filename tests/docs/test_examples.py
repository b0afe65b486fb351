"""The examples of the pages run, and give what stands beside them."""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, code_blocks, name_of

_OFFLINE = [
    pytest.param(block, id=f"{name_of(page)}-{at}")
    for page in PAGES
    for at, block in enumerate(code_blocks(page.read_text(encoding="utf-8"), "python"))
    if "from fastblt import LLM" in block
]


def run(block: str) -> str:
    """What an example prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "example", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize("block", _OFFLINE)
def test_offline_examples_run(block: str) -> None:
    assert run(block).strip()


def test_the_first_example_gives_the_python_that_the_readme_shows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [shown] = code_blocks(text, "text")
    [offline] = [block for block in code_blocks(text, "python") if "from fastblt import LLM" in block]
    ast.parse(shown)
    prompt = "while True:\n    line = file.readline()\n"
    assert prompt.encode("unicode_escape").decode() in offline
    assert prompt + run(offline) == shown


def test_there_are_examples() -> None:
    pages = {Path(str(parameter.id).rsplit("-", 1)[0]) for parameter in _OFFLINE}
    assert {Path("README.md"), Path("docs/offline.md")} <= pages
