"""Options of a command from flags, the environment and a file, in this order; and what came of them."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import typer

logger = logging.getLogger("fastblt")

_SECRET = frozenset({"api_key"})


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a TOML file's values the defaults of a command's options. Raises typer.BadParameter.

    Names are those of the flags, with dashes or underscores.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(f"{path}: there is no option {unknown[0]!r}")
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise typer.BadParameter(f"{path}: {tables[0]!r} must not be a table")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def read_keys(keys: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """API keys as they were given, and those of a file's lines. Raises typer.BadParameter."""
    found = [key.strip() for key in keys or ()]
    if path is not None:
        try:
            found += [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--api-key-file {path}: {error}") from None
    # A server that was to be closed must not stand open.
    if (keys or path is not None) and not (found and all(found)):
        raise typer.BadParameter("an API key must not be empty")
    return tuple(found)


def show_config(context: typer.Context) -> None:
    """Log every option and where it came from, secrets hidden."""
    shown = []
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name in _SECRET and value:
            value = "***"
        origin = source.name.lower().replace("_map", "_file") if source is not None else "default"
        mark = "" if origin == "default" else f" ({origin.replace('default_file', 'file')})"
        shown.append(f"{name}={value}{mark}")
    logger.info("options: %s", ", ".join(shown))
