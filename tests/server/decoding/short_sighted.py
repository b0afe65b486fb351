"""The engine process of a real engine that takes in more requests than fit, and so has to preempt."""

from __future__ import annotations

import sys

from fastblt.server.engine.engine import Engine
from fastblt.server.process import engine_main
from fastblt.server.settings import EngineSettings
from tests.server.harness import short_sighted

COMMAND = [sys.executable, "-m", "tests.server.decoding.short_sighted"]


def _load(settings: EngineSettings) -> Engine:
    return short_sighted(Engine.load(settings))


if __name__ == "__main__":
    sys.exit(engine_main.main(_load))
