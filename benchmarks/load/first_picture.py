"""How long a newcomer waits: seconds from `fastblt serve` to the first bytes on the page at /, in a real browser.

    python -m fastblt.benchmarks.load.first_picture    a first start, which compiles the kernels, and a later one

It needs Chromium, and the extra `dev` for Playwright. The browser is open before the command is given, and loads the
page as soon as somebody answers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.serving import running
from fastblt.benchmarks.markdown import Table
from fastblt.server.settings import PRETRAINED


def measure(*, model: str = str(PRETRAINED), screenshot: Path | None = None) -> dict[str, Any]:
    """Print and return seconds until the server answers, until the first byte on the page, and until all 256 are there.
    `screenshot` is written then. Raises RuntimeError without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        raise RuntimeError("there is no Chromium; install it (apt-get install chromium), or give its path in CHROMIUM")
    table = Table("start", "answers, s", "first byte on the page, s", "256 bytes, s")
    result: dict[str, Any] = {}
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as cache, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            for name in ("first", "later"):
                row = result[name] = _start(browser, model, screenshot)
                table.row(name, *(f"{seconds:.1f}" for seconds in row.values()))
        finally:
            os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)
        browser.close()
    return result


def _start(browser: Browser, model: str, screenshot: Path | None) -> dict[str, float]:
    began = time.perf_counter()
    with running(["fastblt", "serve", model], "/health") as server:
        answers = time.perf_counter() - began
        page = browser.new_page()
        page.goto(server.url)
        page.locator("#watch-max_tokens").fill("256")
        page.get_by_role("button", name="Write").click()
        page.locator(".b[data-at]").first.wait_for()
        first = time.perf_counter() - began
        page.locator("#play:enabled").wait_for()
        whole = time.perf_counter() - began
        if screenshot is not None:
            page.screenshot(path=screenshot, full_page=True)
        page.close()
    return {"answers_s": answers, "first_byte_s": first, "whole_s": whole}


app = command(measure)

if __name__ == "__main__":
    app()
