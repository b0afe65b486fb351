"""`fastblt` as users run it, but with faults: `python -m tests.faults.injected serve ...`.

The faults are named in the environment, as JSON: `raise_at` has the numbers of the decoder passes that raise, `oom_at`
of those that run out of memory, `pause` the seconds that every pass takes longer; with `poison` the model knows one
byte, POISON, as NaN; `clock` is a file with the seconds by which the wall clock is wrong, and `reader_seconds` how
long a client may read nothing. The engine is the real one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastblt.server.process import engine_main as process
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings

VARIABLE = "FASTBLT_TEST_FAULTS"

#: The byte that the model knows as NaN only, where a test asks for it. Others draw it by chance now and then.
POISON = "\x01"


def load(settings: EngineSettings) -> Any:
    import torch

    from fastblt.server.engine import engine as module
    from fastblt.server.engine import load as loading

    faults = _faults()
    load_checkpoint = loading.load_checkpoint

    def load_poisoned(*args: Any, **more: Any) -> Any:
        model = load_checkpoint(*args, **more)
        with torch.no_grad():
            model.local_encoder.embed_tokens.weight[ord(POISON) + 4] = float("nan")
        return model

    if faults.get("poison"):
        loading.load_checkpoint = load_poisoned
    engine = module.Engine.load(settings)
    real, calls = engine._runner.decode, 0

    def decode(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(faults.get("pause", 0.0))
        if calls in faults.get("raise_at", ()):
            raise RuntimeError("a secret detail")
        if calls in faults.get("oom_at", ()):
            raise MemoryError
        return real(batch)

    engine._runner.decode = decode  # type: ignore[method-assign]
    return engine


def main() -> int:
    faults = _faults()
    if clock := faults.get("clock"):
        real = time.time
        time.time = lambda: real() + float(Path(clock).read_text() or 0)
    if sys.argv[1:] == ["engine"]:
        return process.main(load)

    from fastblt.server.api import serve
    from fastblt.server.cli import app

    serve.READER_SECONDS = faults.get("reader_seconds", serve.READER_SECONDS)
    defaults = EngineClient.__init__.__kwdefaults__
    assert "command" in defaults
    defaults["command"] = [sys.executable, "-m", __spec__.name, "engine"]
    app()
    return 0


def _faults() -> dict[str, Any]:
    return json.loads(os.environ.get(VARIABLE, "{}"))


if __name__ == "__main__":
    sys.exit(main())
