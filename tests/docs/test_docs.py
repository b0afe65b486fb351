"""What the pages point to is there: links, paths, modules, commands, options, targets of make."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fastblt.benchmarks import cli
from tests.docs.pages import PAGES, PRESENT, ROOT, anchors, code_blocks, command_lines, inline_code, name_of

_FOLDERS = ("benchmarks", "deploy", "docs", "kernels", "models", "server", "src", "tests")
_OF_A_PAGE = pytest.mark.parametrize("page", PRESENT, ids=name_of)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@_OF_A_PAGE
def test_paths_exist(page: Path) -> None:
    """Names in code font that begin with a folder of the repository; `NAME` stands for any name."""
    for code in inline_code(page.read_text(encoding="utf-8")):
        if re.fullmatch(rf"({'|'.join(_FOLDERS)})/[\w./*-]*", code) and "NAME" not in code:
            assert any(ROOT.glob(code.rstrip("/"))), code


@_OF_A_PAGE
def test_modules_exist(page: Path) -> None:
    for module in re.findall(r"python -m (fastblt[\w.]*)", page.read_text(encoding="utf-8")):
        path = ROOT.joinpath("src", *module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@_OF_A_PAGE
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        words = shlex.split(line, posix=True)
        at = next(i for i, word in enumerate(words) if word.endswith("fastblt") or word.startswith("fastblt."))
        if words[at].startswith("fastblt."):
            # A module's own options: what its source does not write out it does not have.
            source = ROOT.joinpath("src", *words[at].split(".")).with_suffix(".py")
            _check_source(source, words[at + 1 :], line)
        else:
            _check_command(words[at + 1 :], line)


def _check_command(words: list[str], line: str) -> None:
    command = get_command(cli.app)
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    if command.context_settings.get("ignore_unknown_options"):
        from fastblt.models.training import train

        _check_source(Path(train.__file__), words, line)
        return
    known = {"--help"} | {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{word} in: {line}"


def _check_source(source: Path, words: list[str], line: str) -> None:
    text = source.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            field = word[2:].partition("=")[0]
            assert field in text or field.replace("-", "_") in text, f"{word} in: {line}"


@_OF_A_PAGE
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    for code in [*lines, *inline_code(text)]:
        if called := re.match(r"make ([a-z-]+)", code):
            assert re.search(rf"^{called[1]}:", makefile, re.MULTILINE), code


@_OF_A_PAGE
def test_python_is_python(page: Path) -> None:
    if page.parent.name == "pretrained":
        return  # What the model writes is what it is.
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


@_OF_A_PAGE
def test_pages_tell_no_history(page: Path) -> None:
    """The notebook does."""
    text = page.read_text(encoding="utf-8")
    for words in ("by now", "used to ", "an engine in which", "earlier engine", "previously", "no longer exists"):
        assert words not in text.lower(), words
