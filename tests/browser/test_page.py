"""The page in a browser: it watches, races, tells of its server, asks for a key, and says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import KEY, SCREENS
from tests.browser.proxy import below
from tests.server.api.running import RunningServer

PROMPT = "def naïve(x):\n    "


def watch(page: Page, method: str, tokens: int = 60) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Method", exact=True).select_option(method)
    page.locator("#watch-max_tokens").fill(str(tokens))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#play")).to_be_enabled()


def race(page: Page) -> None:
    page.get_by_role("tab", name="Race").click()
    page.locator("#race-max_tokens").fill("60")
    page.get_by_role("button", name="Race", exact=True).click()
    expect(page.locator("#race-again")).to_be_visible()


def made(page: Page) -> list[str]:
    """How each byte of the completion was made, by the classes of its cells."""
    classes = page.locator("#bytes .b[data-at]").evaluate_all("cells => cells.map((cell) => cell.className)")
    return [re.search(r"o-(\w+)", one)[1] for one in classes]  # type: ignore[index]


@pytest.mark.parametrize("method", ["auto", "blt", "blt-s", "blt-dv", "blt-dsv", "blt-d"])
def test_watch_shows_every_byte_and_how_it_was_made(page: Page, server: RunningServer, method: str) -> None:
    page.goto(server.url)
    expect(page.locator("#model-line")).to_contain_text("tiny")
    watch(page, method)
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0.8, "top_p": 0.95, "seed": 1}
    answer = server.complete(**body, decoding={"method": method}, return_rounds=True)
    rounds = answer["choices"][0]["rounds"]
    if method != "auto":
        assert made(page) == [origin for one in rounds for origin in one["origins"]]
    assert len(made(page)) == answer["usage"]["completion_tokens"]
    # The prompt stands in front, whole characters first.
    given = page.locator("#bytes .b.o-given")
    assert given.count() == len(PROMPT.encode()) and given.nth(6).inner_text() == "ï"
    assert page.locator("#scrub").get_attribute("max") == str(page.locator("#scrub").input_value())
    expect(page.locator("#watch-tiles")).to_contain_text("bytes/s")


def test_rounds_can_be_scrubbed_with_the_keyboard(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    watch(page, "blt-s")
    scrub = page.locator("#scrub")
    scrub.focus()
    page.keyboard.press("Home")
    assert made(page) == []
    page.keyboard.press("ArrowRight")
    first = len(made(page))
    assert first > 0 and "round 1 of" in (scrub.get_attribute("aria-valuetext") or "")
    page.keyboard.press("ArrowRight")
    assert len(made(page)) > first
    expect(page.locator("#round-facts")).to_contain_text("drafted")
    page.keyboard.press("End")
    assert len(made(page)) == 60


def test_a_byte_tells_how_it_was_made_and_what_else_it_could_have_been(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    watch(page, "blt-dv")
    page.locator("#bytes").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#byte-facts")).to_contain_text("byte 1: by the whole model")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#byte-facts")).to_contain_text("round 2")
    page.locator("#bytes .b[data-at='5']").hover()
    expect(page.locator("#byte-facts")).to_contain_text("byte 6:")
    expect(page.locator("#byte-facts .option.chosen")).to_have_count(1)
    assert page.locator("#byte-facts .option").count() >= 5
    page.locator("#bytes .b[data-at='9']").click()
    expect(page.locator("#byte-facts")).to_contain_text("entropy before it")


def test_a_race_proves_that_lossless_methods_wrote_the_same(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    race(page)
    expect(page.locator("#verdict")).to_contain_text("The same 60 bytes: blt, blt-s, blt-dv, blt-dsv")
    assert page.locator(".lane").count() == 5
    texts = page.locator(".lane-text").all_inner_texts()
    assert len(set(texts[:4])) == 1 and texts[0]
    assert page.locator(".lane.first").count() == 1
    # One method is no race, and six are too many.
    for name in ("blt", "blt-s", "blt-dv", "blt-dsv"):
        page.locator(f"#race-methods input[value='{name}']").uncheck()
    expect(page.get_by_role("button", name="Race", exact=True)).to_be_disabled()


def test_the_server_s_view_counts_and_asks_only_while_it_is_looked_at(page: Page, server: RunningServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    expect(page.locator("#model-line")).to_contain_text("tiny")
    page.wait_for_timeout(2500)
    assert not [url for url in asked if "metrics" in url]
    quiet = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == quiet
    page.get_by_role("tab", name="Server").click()
    expect(page.locator("#server-tiles")).to_contain_text("ready")
    server.complete(prompt="Hi", max_tokens=30, ignore_eos=True)
    expect(page.locator(".chart .latest").first).to_contain_text("bytes/s")
    page.get_by_role("tab", name="Watch").click()
    page.wait_for_timeout(300)
    until_now = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == until_now


def test_a_key_is_asked_for_and_used(page: Page, locked: RunningServer) -> None:
    page.goto(locked.url)
    expect(page.locator("#problem")).to_have_text("This server wants an API key.")
    page.get_by_label("API key of this server").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#problem")).to_be_visible()
    page.get_by_label("API key of this server").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model-line")).to_contain_text("tiny")
    expect(page.locator("#problem")).to_be_hidden()
    watch(page, "blt-s")
    assert len(made(page)) == 60
    assert KEY not in page.locator("#watch-curl").inner_text() and KEY not in page.url


def test_errors_are_told_and_do_not_last(page: Page, server: RunningServer) -> None:
    page.goto(server.url)
    page.get_by_label("Prompt", exact=True).fill("x" * 5000)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_contain_text("prompt")
    watch(page, "blt")
    expect(page.locator("#problem")).to_be_hidden()
    page.route("**/v1/completions", lambda route: route.abort())
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_it_works_below_a_prefix(page: Page, server: RunningServer) -> None:
    with below("/deep/blt/", server.url) as url:
        page.goto(url)
        expect(page.locator("#model-line")).to_contain_text("tiny")
        watch(page, "blt-dsv")
        assert len(made(page)) == 60
        page.get_by_role("tab", name="Server").click()
        expect(page.locator("#server-tiles")).to_contain_text("ready")
        assert url in page.locator("#watch-curl").text_content()  # type: ignore[operator]


def test_views_are_tabs_of_the_keyboard_and_have_addresses(page: Page, server: RunningServer) -> None:
    page.goto(f"{server.url}/#race")
    expect(page.locator("#race")).to_be_visible()
    page.get_by_role("tab", name="Race").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#server")).to_be_visible()
    assert page.url.endswith("#server")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#watch")).to_be_visible()
    expect(page.get_by_role("tab", name="Watch")).to_be_focused()


def test_nothing_moves_where_that_is_not_wanted_and_else_it_does(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.locator("#watch-max_tokens").fill("40")
    page.get_by_label("Method", exact=True).select_option("blt-s")
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#bytes .ghost").first).to_be_attached()
    expect(page.locator("#play")).to_be_enabled(timeout=30_000)
    answer = server.complete(
        prompt=page.locator("#prompt").input_value(), max_tokens=40, temperature=0.8, top_p=0.95, seed=1
    )
    assert len(made(page)) == answer["usage"]["completion_tokens"] and page.locator("#bytes .ghost").count() == 0
    context.close()


def problems(page: Page) -> list[dict[str, Any]]:
    """What axe-core finds, of serious and critical impact."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        {"id": one["id"], "help": one["help"], "where": [node["html"][:120] for node in one["nodes"][:3]]}
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", list(SCREENS))
def test_it_fits_and_is_accessible(browser: Browser, server: RunningServer, screen: str, scheme: Any) -> None:
    width, height = SCREENS[screen]
    # axe-core is put into the page by the test, which the page's own policy forbids.
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True
    )
    page = context.new_page()
    page.goto(server.url)
    watch(page, "blt-dv")
    page.locator("#bytes .b[data-at='3']").click()
    page.locator("details summary").click()
    for view in ("Watch", "Race", "Server"):
        if view == "Race":
            race(page)
        page.get_by_role("tab", name=view).click()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, view
        assert problems(page) == [], view
    context.close()
