"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class StateError(ValueError):
    """A run cannot go on from the state in its folder. The message says what to do."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file's path, flush that file to disk, and rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, lambda to: to.write_text(json.dumps(value, indent=2) + "\n"))
