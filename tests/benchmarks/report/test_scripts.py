"""Every script of the full run takes the options that it is given."""

from __future__ import annotations

import importlib

import pytest
import typer

from fastblt.benchmarks.report.scripts import SCRIPTS


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_options_are_those_of_the_script(name: str, quick: bool) -> None:
    module, *options = SCRIPTS[name].arguments("MODEL", quick)
    command = typer.main.get_command(importlib.import_module(module).app)
    if commands := getattr(command, "commands", None):
        command = commands[options.pop(0)]
    # Unknown options, and values of another type, raise.
    context = command.make_context(name, [*options, "--json", "result.json"])
    assert str(context.params["json_path"]) == "result.json"
    with pytest.raises(Exception, match="No such option"):
        command.make_context(name, [*options, "--nosuch"])
