"""What each method's text is worth, as a part of the full run: `fastblt eval quality` with a JSON file.

python -m fastblt.benchmarks.evaluation.methods    six to fifteen minutes on two cores
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.evaluation import quality
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.server.settings import PRETRAINED


def measure(
    *, model: str = str(PRETRAINED), setting: list[str] | None = None, prompts: int = 1500, length: int = 64
) -> dict[str, Any]:
    """The result of `quality.evaluate` on `prompts` held-out places, without what it knows of single places."""
    with tempfile.TemporaryDirectory() as folder:
        target = Target(None, model, concurrency=64)
        result = asyncio.run(quality.evaluate(target, setting, prompts, 1, length, Path(folder)))
    rows = {
        name: {key: value for key, value in row.items() if key != "parsed"} for name, row in result["settings"].items()
    }
    return result | {"settings": rows}


app = command(measure)

if __name__ == "__main__":
    app()
