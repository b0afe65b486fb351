"""Builds the documentation as a site, and follows its links: `python -m fastblt.deploy.site [FOLDER]`.

The pages are those of the repository, at the same places, so that their links lead where they lead there. Files that
they link to come along. Raises SystemExit where a page or a link is wrong.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "models/pretrained/README.md")
#: As the header of the page at `/`.
_STYLE = ":root { --md-primary-fg-color: #1f4f86; --md-primary-bg-color: #ffffff; }\n"
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def pages() -> Iterator[Path]:
    """All pages, relative to the root."""
    yield from map(Path, PAGES)
    yield from (path.relative_to(ROOT) for path in sorted((ROOT / "docs").rglob("*.md")))


def collect(target: Path) -> None:
    """Copy the pages and what they link to. A link to a folder becomes text: a site has no such page."""
    (target / "site.css").write_text(_STYLE)
    _copy(Path("server/api/page/files/icon.svg"), target)
    for page in pages():
        place = target / page
        place.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text(encoding="utf-8")
        place.write_text(_LINK.sub(partial(_linked, page, target), text), encoding="utf-8")


def _linked(page: Path, target: Path, link: re.Match[str]) -> str:
    address = urldefrag(link[2]).url
    if not address or ":" in address:
        return link[0]
    path = (ROOT / page.parent / address).resolve()
    if path.is_dir():
        return link[1]
    if path.is_file() and path.suffix != ".md":
        _copy(path.relative_to(ROOT), target)
    return link[0]


def _copy(path: Path, target: Path) -> None:
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, target / path)


class _Links(HTMLParser):
    """The addresses that a page names, and the places in it that can be named."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Links between the site's files that lead nowhere, and links that leave it to load something."""
    read: dict[Path, _Links] = {}
    for path in site.rglob("*.html"):
        read[path] = _Links()
        read[path].feed(path.read_text(encoding="utf-8"))
    dead = []
    for path, found in read.items():
        if path.name == "404.html":
            continue
        for link in found.links:
            address, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", address):
                continue
            other = (path.parent / unquote(address)).resolve() if address else path
            other = other / "index.html" if other.is_dir() else other
            if not other.exists() or (anchor and other in read and anchor not in read[other].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    return sorted(dead)


def main(site: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder))
        config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=folder, site_dir=str(site), strict=True)
        build(config)
    if dead := dead_links(site):
        raise SystemExit("dead links:\n" + "\n".join(dead))
    print(f"{site}: {sum(1 for _ in site.rglob('*.html'))} pages, no dead link")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "site")
