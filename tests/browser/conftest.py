"""A real browser (Chromium) and a real server. Without the browser these tests are left out, unless CHROMIUM is set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import HttpSettings, ServiceSettings
from tests.server.api.running import RunningServer, save_tiny, tiny_settings

#: Width and height of a phone, a tablet and a desk.
SCREENS = {"phone": (360, 740), "tablet": (820, 1180), "desk": (1440, 900)}

KEY = "a-key"


def chromium() -> str | None:
    """The path of a Chromium: CHROMIUM, or the first that is found."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


# Of one module: while Playwright runs, its event loop is that of the thread, and no other test can have one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield one
        one.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page at a desk. In the end it has logged no error, and has asked nobody but its server."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    one = context.new_page()
    troubles: list[str] = []
    one.on("pageerror", lambda error: troubles.append(str(error)))
    one.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
    asked: set[str] = set()
    one.on("request", lambda request: asked.add(request.url.split("/")[2]))
    one.set_default_timeout(20_000)
    yield one
    # What the server refuses is logged by the browser itself.
    assert [text for text in troubles if "Failed to load resource" not in text] == []
    assert len(asked) <= 1, asked
    context.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("tiny")))


def serving(checkpoint: str, http: HttpSettings | None = None) -> RunningServer:
    service = ServiceSettings(probe_interval=3600.0)
    client = EngineClient(tiny_settings(checkpoint, deterministic=True), service, name="tiny")
    return RunningServer(client, http)


@pytest.fixture(scope="session")
def server(checkpoint: str) -> Iterator[RunningServer]:
    with serving(checkpoint) as running:
        yield running


@pytest.fixture
def locked(checkpoint: str) -> Iterator[RunningServer]:
    """A server that wants a key."""
    with serving(checkpoint, HttpSettings(api_keys=(KEY,), shutdown_timeout=0.0)) as running:
        yield running
