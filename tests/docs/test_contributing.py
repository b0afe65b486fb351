"""The page for contributors against the code: files and names on a request's way, and where a method goes."""

from __future__ import annotations

import re

import pytest

from fastblt.server.engine.engine import Engine
from tests.docs.pages import ROOT
from tests.test_architecture import imports

PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def named_files(text: str) -> list[str]:
    return re.findall(r"`((?:server|models|kernels)/[\w./]+\.\w+)`", text)


_LIFE_FILES = set(named_files(section("Life of a request")))


def test_names_on_a_request_s_way_are_in_their_files() -> None:
    """After a path, up to the next one, names in code font are of that file."""
    pieces = re.split(r"`((?:server|models|kernels)/[\w./]+\.\w+)`", section("Life of a request"))
    checked = 0
    for path, text in zip(pieces[1::2], pieces[2::2], strict=True):
        # A sentence's end, or a bracket, ends what is said of a file.
        listed = re.match(r", ((?:`\w+`(?:, | and )?)+)", text)
        for name in re.findall(r"`(\w+)`", listed[1]) if listed else []:
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{name} in {path}"
            checked += 1
    assert checked > 20


def test_a_request_s_way_passes_only_files_that_it_can() -> None:
    """Every Python file of the list is imported from one end of the socket, from the other, or offline."""
    todo, reached = ["server.cli.serve", "server.process.engine_main", "server.llm"], set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports(name)
    files = {name.removesuffix(".py").replace("/", ".") for name in _LIFE_FILES if name.endswith(".py")}
    assert files <= reached, files - reached


def test_where_a_method_goes_is_where_methods_are() -> None:
    """Files of server/ and models/ that name a method or a method's settings, but for the methods' own."""
    named = set(named_files(section("Add a decoding method")))
    pattern = re.compile(r"DecodingMethod\.BLT_|\bBlt(S|D|DV|DSV)\b|\bdraft_length\b|\bblt_(s|d|dv|dsv)\b")
    for folder in ("server", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if pattern.search(path.read_text(encoding="utf-8")) and "training" not in path.parts:
                assert name in named or name.startswith("server/decoding/blt"), name


@pytest.mark.parametrize("name", ["add", "step"])
def test_the_engine_s_two_calls_are_those_of_the_list(name: str) -> None:
    assert f"`server/engine/engine.py`, `{name}`" in PAGE and callable(getattr(Engine, name))
