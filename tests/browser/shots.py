"""Takes the pictures of the page that the documentation shows: `python -m tests.browser.shots [FOLDER]`.

It serves the shipped checkpoint and opens the page in Chromium. Pictures are PNG, the animation is a GIF.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings
from tests.browser.conftest import chromium
from tests.server.api.running import RunningServer

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
#: Frames of the animation, the milliseconds that each is shown, and its colors.
FRAMES, FRAME_MS, COLORS = 90, 110, 96


def open_page(browser: Browser, url: str, width: int, height: int, scheme: str, *, moving: bool = False) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=1 if moving else 1.5,
        reduced_motion=None if moving else "reduce",
    )
    page = context.new_page()
    page.goto(url)
    page.locator("#model-line", has_text="bytes").wait_for()
    return page


def write(page: Page, method: str, tokens: int) -> None:
    page.get_by_label("Method", exact=True).select_option(method)
    page.locator("#watch-max_tokens").fill(str(tokens))
    page.get_by_role("button", name="Write").click()
    page.locator("#play:enabled").wait_for()


def watch(browser: Browser, url: str, path: Path, scheme: str, width: int, height: int) -> None:
    page = open_page(browser, url, width, height, scheme)
    write(page, "blt-dv", 200)
    # A round of which a part was refused.
    kept = "[...document.querySelectorAll('.o-corrected.b[data-at]')].at(1) ?? document.querySelector('.b[data-at]')"
    page.evaluate(f"{{ const cell = {kept}; cell.click(); }}")
    page.evaluate(
        "{ const scrub = document.querySelector('#scrub');"
        " scrub.value = Math.ceil(scrub.max * 0.7); scrub.dispatchEvent(new Event('input')); }"
    )
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)
    page.context.close()


def race(browser: Browser, url: str, path: Path) -> None:
    page = open_page(browser, url, 1280, 900, "dark")
    page.get_by_role("tab", name="Race").click()
    page.get_by_role("button", name="Race", exact=True).click()
    page.locator("#race-again").wait_for(state="visible")
    page.screenshot(path=path, full_page=True)
    page.context.close()


def server_view(browser: Browser, server: RunningServer, path: Path) -> None:
    page = open_page(browser, server.url, 1280, 700, "light")
    page.get_by_role("tab", name="Server").click()
    for seed in range(6):
        for method in ("blt-s", "blt-dsv"):
            server.complete(prompt="import os\n", max_tokens=900, seed=seed, decoding={"method": method})
        page.wait_for_timeout(1000)
    page.screenshot(path=path, full_page=True)
    page.context.close()


def animation(browser: Browser, url: str, path: Path) -> None:
    page = open_page(browser, url, 900, 900, "light", moving=True)
    page.get_by_label("Method", exact=True).select_option("blt-dsv")
    page.locator("#watch-max_tokens").fill("120")
    page.get_by_role("button", name="Write").click()
    page.locator("#bytes .ghost").first.wait_for(state="attached")
    stage = page.locator(".stage")
    frames = []
    while len(frames) < FRAMES and page.locator("#play").is_disabled():
        frames.append(Image.open(io.BytesIO(stage.screenshot())).convert("RGB"))
    frames.append(Image.open(io.BytesIO(stage.screenshot())).convert("RGB"))
    height = max(frame.height for frame in frames)
    same = [Image.new("RGB", (frame.width, height), "white") for frame in frames]
    for canvas, frame in zip(same, frames, strict=True):
        canvas.paste(frame)
    palette = same[-1].quantize(COLORS)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in same]
    durations = [FRAME_MS] * (len(indexed) - 1) + [3000]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=True)
    page.context.close()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = EngineSettings(cache_bytes=2**28, max_model_len=8192)
    with RunningServer(EngineClient(settings)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        watch(browser, server.url, folder / "watch.png", "light", 1280, 900)
        watch(browser, server.url, folder / "watch-phone.png", "dark", 390, 844)
        race(browser, server.url, folder / "race.png")
        server_view(browser, server, folder / "server.png")
        animation(browser, server.url, folder / "watch.gif")
        browser.close()
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
