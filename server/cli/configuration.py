"""Options of a command from flags, the environment and a file, in this order; and what came of them."""

from __future__ import annotations

import json
import logging
import os
import tomllib
from pathlib import Path
from typing import Any

import typer

logger = logging.getLogger("fastblt")

_SECRET = frozenset({"api_key"})


#: A file of options or keys is never longer.
_MAX_BYTES = 2**20


def _read(path: Path) -> bytes:
    """What a small file holds. Raises ValueError for one that does not end: a device, or the wrong file."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES} bytes")
    return data


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a TOML file's values the defaults of a command's options. Raises typer.BadParameter.

    Names are those of the flags, with dashes or underscores.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(_read(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(f"{path}: there is no option {unknown[0]!r}")
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise typer.BadParameter(f"{path}: {tables[0]!r} must not be a table")
    if empty := [
        name for name, value in values.items() if value in ("", []) or (isinstance(value, str) and value.isspace())
    ]:
        raise typer.BadParameter(f"{path}: {empty[0]!r} is empty; give it a value, or leave it out")
    for parameter in context.command.params:
        _check_value(context, path, parameter, values.get(parameter.name or ""))
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _check_value(context: typer.Context, path: Path, option: Any, value: Any) -> None:
    """Raise typer.BadParameter, with file and name, for a value that the option cannot have."""
    if value is None:
        return
    name = (option.name or "").replace("_", "-")
    if option.multiple and not isinstance(value, list):
        raise typer.BadParameter(f"{path}: {name} must be a list: {name} = [{json.dumps(value)}]")
    if not option.multiple and isinstance(value, list):
        raise typer.BadParameter(f"{path}: {name} must be one value, not a list")
    try:
        option.process_value(context, value)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{path}: {name}: {error.message}") from None


def check_environment(context: typer.Context) -> None:
    """Raise typer.BadParameter for a variable that is set to nothing, or for a key that no option is named like.

    Both would be passed over, and a server that was to be closed would stand open.
    """
    names = {f"{context.auto_envvar_prefix}_{(option.name or '').upper()}" for option in context.command.params}
    for name, value in os.environ.items():
        if name in names and not value.strip():
            raise typer.BadParameter(f"{name} is set to nothing; give it a value, or unset it")
        if name.startswith("FASTBLT_") and "KEY" in name and name not in names:
            raise typer.BadParameter(f"{name} names no option; keys are in FASTBLT_SERVE_API_KEY")


def read_keys(keys: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """API keys as they were given, and those of a file: one a line, without empty lines and those that begin with #.

    Raises typer.BadParameter.
    """
    found = [(key.strip(), "an API key") for key in keys or ()]
    if path is not None:
        try:
            lines = _read(path).decode("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--api-key-file {path}: {error}") from None
        numbered = [(line.strip(), f"line {number} of {path}") for number, line in enumerate(lines, 1)]
        listed = [(key, where) for key, where in numbered if key and not key.startswith("#")]
        if not listed:
            raise typer.BadParameter(f"--api-key-file {path} has no key")
        found += listed
    for key, where in found:
        # A server that was to be closed must not stand open, or be closed to those who have a key.
        if not key:
            raise typer.BadParameter(f"{where} must not be empty")
        if len(key.split()) > 1 or not key.isprintable():
            raise typer.BadParameter(f"{where} must not have white space or control characters within it")
    return tuple(key for key, _ in found)


def show_config(context: typer.Context) -> None:
    """Log the options that were given and where each came from, secrets hidden; all of them in a log of DEBUG."""
    shown, given = [], []
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name in _SECRET and value:
            value = "***"
        origin = source.name.lower().replace("_map", "_file") if source is not None else "default"
        mark = "" if origin == "default" else f" ({origin.replace('default_file', 'file')})"
        shown.append(f"{name}={value}{mark}")
        if mark:
            given.append(shown[-1])
    logger.debug("all options: %s", ", ".join(shown))
    logger.info("options: %s", ", ".join(given) or "all as they are by default")
