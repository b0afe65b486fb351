"""The dashboard's queries and the alert rules against a real server, scraped by a real Prometheus."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest

from fastblt.deploy.monitoring import ALERTS, load, prometheus, promtool, queries
from fastblt.server.process.client import EngineClient
from tests.server.api.running import RunningServer, save_tiny, tiny_settings, until

#: Queries of what a healthy server has nothing of.
NOTHING = {"Preemptions", "Engines that were replaced"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")
def test_every_query_is_answered_and_every_rule_is_sound(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS))
    client = EngineClient(tiny_settings(save_tiny(tmp_path), prefix_cache=True), name="tiny")
    with RunningServer(client) as server, prometheus(server.url.removeprefix("http://")) as asked:
        load(server.url, 1.0, clients=2, max_tokens=24)
        until(lambda: asked.ask("fastblt_method_tokens_total"))
        load(server.url, 3.0, clients=2, max_tokens=24)
        promtool("check", "metrics", text=httpx.get(f"{server.url}/metrics").text)
        for query in queries():
            # Rates need two scrapes with load between them.
            until(lambda query=query: asked.ask(query.bound("30s")), 10)  # type: ignore[misc]
            if query.panel not in NOTHING:
                values = [float(one["value"][1]) for one in asked.ask(query.bound("30s"))]
                assert any(value > 0 for value in values) or "refused" not in query.legend, query
        rules = asked.rules()
        assert len(rules) >= 10
        until(lambda: all(rule["health"] == "ok" for rule in asked.rules()), 30)
        assert [rule["name"] for rule in asked.rules() if rule["state"] == "firing"] == []


def test_queries_and_rules_name_metrics_that_there_are(tmp_path: Path) -> None:
    with RunningServer(EngineClient(tiny_settings(save_tiny(tmp_path)), name="tiny")) as server:
        server.complete(prompt="Hi", decoding={"method": "blt-s"})
        page = server.http.get("/metrics").text
    known = set(re.findall(r"^(fastblt_\w+)", page, re.MULTILINE)) | set(
        re.findall(r"^# TYPE (\w+)", page, re.MULTILINE)
    )
    wanted = {name for query in queries() for name in re.findall(r"fastblt_\w+", query.expression)}
    wanted |= set(re.findall(r"fastblt_\w+", ALERTS.read_text()))
    assert wanted <= known, wanted - known


def test_every_alert_is_explained() -> None:
    page = (ALERTS.parents[2] / "docs" / "operations.md").read_text()
    for name in re.findall(r"alert: (\w+)", ALERTS.read_text()):
        assert f"`{name}`" in page
