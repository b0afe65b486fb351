"""The page at `/`: one HTML file, one style sheet and a few scripts, sent as they are.

They ask the same API as every other client. Nothing comes from elsewhere, and the browser is told to load nothing else.
All addresses within the page are relative, so that it works behind a proxy's prefix.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_FOLDER = Path(__file__).parent / "files"

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

#: Names of the files below /page/.
_NAMES = tuple(sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _TYPES and path.suffix != ".html"))

#: Paths that are answered without a key: who opens the page is asked for one there.
PATHS = frozenset({"/", *(f"/page/{name}" for name in _NAMES)})

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # After an update of the server nobody sees an old script with a new page.
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


def _file(name: str) -> Response:
    media_type = f"{_TYPES[Path(name).suffix]}; charset=utf-8"
    return Response(_read(name), media_type=media_type, headers=_HEADERS)


@router.get("/")
async def index() -> Response:
    return _file("index.html")


def _add(name: str) -> None:
    async def answer() -> Response:
        return _file(name)

    router.add_api_route(f"/page/{name}", answer, methods=["GET"])


for _name in _NAMES:
    _add(_name)
