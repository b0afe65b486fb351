"""Fields, options and error codes against the pages that explain them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import pytest
from typer.main import get_command

from fastblt.benchmarks import cli
from fastblt.server.api.schemas import CompletionRequest
from fastblt.server.cli.command import VLLM_NAMES
from fastblt.server.request import DecodingMethod, DecodingParams, ErrorCode, SamplingParams, Unmasking
from fastblt.server.settings import EngineSettings
from tests.docs.pages import PRESENT, ROOT, inline_code, name_of


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str) -> Iterator[tuple[set[str], list[str]]]:
    """Of every table: the names in the first cell of a row, and its other cells."""
    for line in text.splitlines():
        if line.startswith("| `"):
            first, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            yield set(re.findall(r"`([\w-]+)`", first)), rest


def explained(text: str) -> set[str]:
    return {name for names, _ in rows(text) for name in names}


def test_every_decoding_field_is_explained() -> None:
    assert {one.name for one in fields(DecodingParams)} <= explained(page("decoding"))
    assert set(DecodingMethod) <= explained(page("decoding"))
    assert all(f"`{rule}`" in page("decoding") for rule in Unmasking)


def test_every_sampling_field_is_explained() -> None:
    elsewhere = {"structured_output", "return_patches", "return_rounds", "decoding"}
    assert {one.name for one in fields(SamplingParams)} - elsewhere <= explained(page("decoding"))
    assert all(name in page("offline") or name in page("api") for name in elsewhere)


def test_defaults_in_the_sampling_table_are_those_of_the_code() -> None:
    defaults = {one.name: one.default for one in fields(SamplingParams) if one.default is not MISSING}
    for names, (_, default, *_) in rows(page("decoding").split("## Sampling", 1)[1]):
        for name in names:
            value: Any = defaults.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and len(names) == 1:
                assert default == f"{value:g}", name


def test_every_field_of_a_request_is_explained() -> None:
    assert set(CompletionRequest.model_fields) <= explained(page("api"))


def test_every_setting_of_the_library_is_explained() -> None:
    assert {one.name for one in fields(EngineSettings)} - {"model"} <= explained(page("offline"))


def test_every_error_code_is_explained() -> None:
    codes = set(ErrorCode)
    for path in (ROOT / "server" / "api").glob("*.py"):
        codes |= set(re.findall(r'code="(\w+)"', path.read_text(encoding="utf-8")))
    text = page("operations")
    assert not [code for code in codes if f"`{code}`" not in text]


def options(command: Any) -> Iterator[str]:
    for one in command.params:
        yield from (*one.opts, *one.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from options(inner)


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_every_option_that_is_named_exists(path: Any) -> None:
    """Of the command, or of a program of this repository."""
    known = set(options(get_command(cli.app))) | set(VLLM_NAMES)
    for code in inline_code(path.read_text(encoding="utf-8")):
        if not (named := re.match(r"(--[a-z][\w-]*)(?=$|[ =])", code)) or named[1] in known:
            continue
        name = named[1].removeprefix("--")
        sources = [source for folder in ("models", "benchmarks", "deploy") for source in (ROOT / folder).rglob("*.py")]
        # An option is written out, or is a parameter of a measurement.
        wanted = re.compile(rf'"--{name}"|\b{name.replace("-", "_")}: ')
        assert any(wanted.search(source.read_text(encoding="utf-8")) for source in sources), code
