"""How both processes log: to standard error, a line an event, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

#: The HTTP request that the running code belongs to.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


#: What takes a while before anything else can be seen: compiling, loading.
progress = logging.getLogger("fastblt.progress")


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class LogSettings:
    """`level` is the least that is logged."""

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.TEXT


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        current = request_id.get()
        # One event is one line, whatever a client made it say; a traceback comes after it.
        first, newline, rest = text.partition("\n")
        if current:
            text = f"{first} request_id={current}{newline}{rest}"
        # What people want to read below the line, and programs have in fields.
        more = getattr(record, "more", None)
        return f"{text}\n{more}" if more else text


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            event["request_id"] = current
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False, default=str)


def configure(settings: LogSettings) -> None:
    """Send this process's log to standard error. What cannot be written, to a full disk say, is dropped."""
    # Otherwise every line that cannot be written would be followed by an attempt to write why.
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    if settings.format is LogFormat.JSON:
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)


def show_progress() -> None:
    """Tell a command's user on standard error what takes a while, and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fastblt: %(message)s"))
    progress.addHandler(handler)
    progress.setLevel(logging.INFO)
    progress.propagate = False
