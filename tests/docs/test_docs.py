"""What the pages point to is there: links, paths, modules, commands, options, targets of make."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
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
    for module in re.findall(r"python -m\s+(fastblt[\w.]*)", page.read_text(encoding="utf-8")):
        path = ROOT.joinpath("src", *module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@_OF_A_PAGE
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith("fastblt") or word.startswith("fastblt."))
        name, rest = words[at], words[at + 1 :]
        if not name.startswith("fastblt."):
            _check_command(get_command(cli.app), rest, line)
        elif (app := _app(name)) is not None:
            _check_command(get_command(app), rest, line)
        else:
            _check_source(name, rest, line)


def _app(module: str) -> Typer | None:
    """What parses a module's options; None where it does so itself, or needs a package that is not here."""
    try:
        app = getattr(importlib.import_module(module), "app", None)
    except ModuleNotFoundError:
        return None
    return app if isinstance(app, Typer) else None


def _check_command(command: Any, words: list[str], line: str) -> None:
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    if command.context_settings.get("ignore_unknown_options"):
        _check_source("fastblt.models.training.train", words, line)
        return
    known = {"--help"} | {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{word} in: {line}"


def _check_source(module: str, words: list[str], line: str) -> None:
    """Options of a program with a parser of its own stand in its source."""
    text = ROOT.joinpath("src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{word} in: {line}"


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
