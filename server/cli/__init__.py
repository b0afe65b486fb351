"""The command `fastblt`: its options and commands. Everything heavy is imported inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from fastblt.server.cli.checkpoints import average, convert, train, widen
from fastblt.server.cli.command import Command, show_version
from fastblt.server.cli.generate import generate
from fastblt.server.cli.serve import serve

app = typer.Typer(
    name="fastblt",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "FASTBLT"},
    pretty_exceptions_enable=False,
)


@app.callback()
def fastblt(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """An inference server for Byte Latent Transformers. Begin with `fastblt serve`."""


for command in (serve, generate, convert, widen, average):
    app.command(cls=Command)(command)
# Its options are the training program's own.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(train)
