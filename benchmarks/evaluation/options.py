"""Options that all evaluations share, and what they do with them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from fastblt.benchmarks import command
from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.machine import write_json
from fastblt.server.settings import PRETRAINED

_SERVER = "Server"

BaseUrl = Annotated[
    str | None,
    typer.Option(help="Of a running server. Default: start one of --model and end it.", rich_help_panel=_SERVER),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="FASTBLT_API_KEY", help="Better in FASTBLT_API_KEY.", rich_help_panel=_SERVER),
]
Model = Annotated[
    str, typer.Option(help="Checkpoint folder or Hub id to serve.", show_default=False, rich_help_panel=_SERVER)
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=_SERVER)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", help="Such as 'blt-d-8 a0.7'; may be given again. Default: each method."),
]
Output = Annotated[Path, typer.Option(help="Folder of results; a run that was interrupted goes on from it.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
AllowWeak = Annotated[
    bool,
    typer.Option("--allow-weak-sandbox", help="Run programs even where a protection is missing here."),
]
Workers = Annotated[int, typer.Option(min=1, help="Programs that run at a time.")]

DEFAULT_MODEL = str(PRETRAINED)
DEFAULT_OUTPUT = Path("evaluation")


def clean_errors() -> AbstractContextManager[None]:
    """What a user can cause ends in one line."""
    return command.clean_errors("eval", "interrupted; the same command goes on")


def write(folder: Path, name: str, result: Record) -> None:
    """Put a result into the folder as `name`.json."""
    write_json(folder / f"{name}.json", result)
