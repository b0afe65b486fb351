"""How both processes log."""

from __future__ import annotations

import logging
from dataclasses import dataclass


@dataclass(frozen=True)
class LogSettings:
    """`level` is a name that `logging` knows."""

    level: str = "INFO"


def configure(settings: LogSettings) -> None:
    """Send this process's log to standard error."""
    logging.basicConfig(level=settings.level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
