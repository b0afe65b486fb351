"""The life of a request in docs/contributing.md, against requests that are watched on their way."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fastblt.server.engine.engine import Engine
from fastblt.server.process.client import EngineClient
from fastblt.server.request import DecodingParams, Request, SamplingParams
from tests.docs.pages import ROOT
from tests.server.api.running import RunningServer, save_tiny, tiny_settings
from tests.server.harness import model, settings

PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
LIFE = PAGE.split("## Life of a request\n", 1)[1].split("\n## ", 1)[0]

#: A file, and a function or a class of it.
Place = tuple[str, str]


def places(begin: str, end: str) -> list[Place]:
    """What the list names between two of its lines, in order: `a file`, `a function or class of it`."""
    text = re.sub(r"\s+", " ", LIFE.split(begin, 1)[1].split(end, 1)[0])
    return re.findall(r"`((?:server|models|kernels)/[\w./]+\.py)`, `(\w+)`", text)


@contextmanager
def watched() -> Iterator[dict[Place, None]]:
    """Calls of our functions, in this thread and in those that start meanwhile: file and qualified name, once each."""
    calls: dict[Place, None] = {}
    prefix = f"{ROOT}/"

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix):
            path = code.co_filename.removeprefix(prefix).removeprefix("src/fastblt/")
            calls[path, code.co_qualname] = None

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def check_order(listed: list[Place], calls: list[Place]) -> None:
    """Every place of the list was called, each for the first time after the one before it."""
    last = -1
    for path, name in listed:
        first = next((i for i, (file, called) in enumerate(calls) if file == path and name in called.split(".")), None)
        assert first is not None, f"{name} of {path} was not called"
        assert first > last, f"{name} of {path} comes earlier"
        last = first


def test_the_engine_passes_its_files_in_this_order() -> None:
    engine = Engine(model(0), settings())
    params = SamplingParams(max_tokens=30, logprobs=0, seed=1, utf8="strict", decoding=DecodingParams("blt-dv"))
    with watched() as calls:
        engine.add(Request("r", [1, *range(40, 60)], params, 0.0))
        while engine.has_work():
            engine.step()
    listed = places("In the engine process:", "11. ")
    assert len(listed) > 15
    check_order(listed, list(calls))


def test_the_server_passes_its_files_in_this_order(tmp_path: Path) -> None:
    with watched() as calls, RunningServer(EngineClient(tiny_settings(save_tiny(tmp_path)), name="tiny")) as server:
        calls.clear()
        server.events(prompt="Hi", max_tokens=20, structured_outputs={"regex": "[a-z]{30}"})
    listed = places("In the HTTP process:", "In the engine process:") + places("Back in the", "Without a server")
    assert len(listed) > 15
    check_order(listed, list(calls))
