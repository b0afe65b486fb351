"""The page's files as the server sends them (tests/browser has the page in a browser)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastblt.server.api import page
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import HttpSettings
from tests.server.api.running import RunningServer, tiny_settings

FILES = Path(page.__file__).parent / "files"


def test_the_page_is_sent_with_a_strict_policy(server: RunningServer) -> None:
    for path in sorted(page.PATHS):
        answer = server.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        name = path.rsplit("/", 1)[1] or "index.html"
        assert answer.content == (FILES / name).read_bytes()


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_files_are_small_and_name_only_each_other(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    # Namespaces are names.
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\son\w+=|<script>|style=|innerHTML|eval\(", text)
    for name in re.findall(r"""(?:src|href)="page/([\w.]+)"|from "\./([\w.]+)""", text):
        assert (FILES / (name[0] or name[1])).exists(), name
    # Absolute paths would leave a proxy's prefix.
    assert not re.search(r"""(?:src|href)="/|fetch\(["'`]/""", text)


def test_a_key_is_not_needed_for_the_page_alone(checkpoint: str) -> None:
    http = HttpSettings(api_keys=("k",), shutdown_timeout=0.0)
    with RunningServer(EngineClient(tiny_settings(checkpoint)), http) as locked:
        assert {locked.http.get(path).status_code for path in page.PATHS} == {200}
        for path in ("/page", "/page/", "/page/../metrics", "/page/no.js", "/v1/models", "/metrics"):
            assert locked.http.get(path).status_code == 401, path
