"""A checkpoint's folder and its `config.json`, read without torch, so that what is wrong with them is said at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastblt.models.config import BltConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: What to do about a file that is broken.
AGAIN = "; copy or download the checkpoint again"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or tensor and what to do."""


def checkpoint_folder(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of `source`: itself, or a snapshot (json, safetensors) of the Hub repository it names."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: no such folder; give a checkpoint folder or a Hub id such as owner/name")
    # Imported here: it costs more than everything else this file needs, and local folders do without.
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:
        # Its own errors, the disk's, and those of a network library that differs by its version.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: cannot be downloaded from the Hub ({reason}); check the name and revision, the network, and for"
            " a gated model the token, or give a local folder"
        ) from error


def read_config(folder: Path) -> BltConfig:
    """The configuration in a checkpoint folder. Raises CheckpointError without a readable one, ConfigError if wrong."""
    raw = read_json(folder / CONFIG_FILE)
    if "args" in raw and "patcher_config" not in raw:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is in the official repository's layout; turn the folder into this project's with"
            " `fastblt convert SOURCE ENTROPY OUTPUT` first"
        )
    return BltConfig.from_dict(raw)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    require_file(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a checkpoint folder in the layout of transformers") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}){AGAIN}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} does not hold a JSON object{AGAIN}")
    return raw


def require_file(path: Path) -> None:
    """Raises CheckpointError for a pipe, a device or a folder: to read one may wait for ever."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file{AGAIN}")
