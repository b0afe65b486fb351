"""The command `fastblt`: its options and commands. Everything heavy is imported inside the commands."""

from __future__ import annotations

import typer

from fastblt.server.cli.checkpoints import convert, train, widen
from fastblt.server.cli.generate import generate
from fastblt.server.cli.serve import serve

app = typer.Typer(
    name="fastblt",
    help="An inference server for Byte Latent Transformers.",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "FASTBLT"},
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, generate, convert, widen):
    app.command()(command)
# Its options are the training program's own.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(train)
