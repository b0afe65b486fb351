"""Runs every query of the dashboard, and the alert rules, on a real Prometheus.

`python -m fastblt.deploy.monitoring` starts a server with the shipped checkpoint and sends it requests of all methods
while Prometheus scrapes it. Then it prints the answers to the queries of each panel. It needs Debian's package
`prometheus`, which includes `promtool`.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

DEPLOY = Path(__file__).resolve().parent
DASHBOARD = DEPLOY / "grafana" / "fastblt.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"

#: Methods of the requests, so that the metrics of drafts and of blocks have values.
METHODS = ("blt", "blt-s", "blt-d", "blt-dv", "blt-dsv")


@dataclass(frozen=True)
class Query:
    panel: str
    expression: str
    legend: str

    def bound(self, window: str, instance: str = ".*") -> str:
        """The expression with values in place of Grafana's variables."""
        return self.expression.replace("$__rate_interval", window).replace("$instance", instance)


def queries(dashboard: Path = DASHBOARD) -> list[Query]:
    """Every query of a dashboard."""
    panels = json.loads(dashboard.read_text("utf-8"))["panels"]
    return [
        Query(panel["title"], target["expr"], target["legendFormat"])
        for panel in panels
        for target in panel.get("targets", [])
    ]


class Prometheus:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The current value of an expression, as an instant vector. Raises ValueError if Prometheus refuses it."""
        answer = self._http.get("/api/v1/query", params={"query": expression}).json()
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer['error']}")
        return answer["data"]["result"]

    def rules(self) -> list[dict[str, Any]]:
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def prometheus(target: str, interval: str = "1s") -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port), with our rules. Raises FileNotFoundError if none is installed."""
    program = shutil.which("prometheus")
    if program is None:
        raise FileNotFoundError("there is no `prometheus`; Debian has a package of this name")
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as sock:
        folder, port = Path(name), sock.getsockname()[1]
        sock.close()
        config = {
            "global": {"scrape_interval": interval, "evaluation_interval": interval},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "fastblt", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        process = subprocess.Popen(command)
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 60
            while not found.ready():
                assert process.poll() is None and time.monotonic() < deadline, "Prometheus does not start"
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()
            process.wait()


def promtool(*arguments: str, text: str | None = None) -> str:
    """The output of promtool. Raises ValueError if it reports a problem."""
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:
        raise ValueError(f"promtool {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def load(url: str, seconds: float, clients: int = 4, max_tokens: int = 64) -> int:
    """Send requests of all methods, some of them invalid or abandoned, for `seconds`. Returns the number of rounds."""
    until = time.monotonic() + seconds

    def visit(number: int) -> int:
        count = 0
        with httpx.Client(base_url=url, timeout=120) as http:
            while time.monotonic() < until:
                method = METHODS[(number + count) % len(METHODS)]
                body = {"prompt": f"def visit_{number}():\n", "max_tokens": max_tokens, "temperature": 0}
                http.post("/v1/completions", json=body | {"ignore_eos": True, "decoding": {"method": method}})
                http.post("/v1/completions", json=body | {"temperature": -1})
                with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as answer:
                    next(answer.iter_raw())
                count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(visit, range(clients)))


def main() -> None:
    with _server() as url:
        target = url.removeprefix("http://")
        with prometheus(target) as asked:
            load(url, 5)
            # Rates are computed only for series that existed at an earlier scrape.
            count = load(url, 30)
            print(f"{count} rounds of requests\n")
            print("promtool check rules:", promtool("check", "rules", str(ALERTS)).split("\n")[1].strip())
            promtool("check", "metrics", text=httpx.get(f"{url}/metrics").text)
            print("promtool check metrics: nothing to say\n")
            print("| panel | query | answer |\n|---|---|---|")
            for query in queries():
                print(f"| {query.panel} | {query.legend} | {_shown(asked.ask(query.bound('30s')), query)} |")
            firing = [rule["name"] for rule in asked.rules() if rule["state"] == "firing"]
            print(f"\n{len(asked.rules())} alert rules, firing: {', '.join(firing) or 'none'}")


def _shown(result: list[dict[str, Any]], query: Query) -> str:
    label = query.legend.rsplit("{{", 1)[-1].rstrip("}") if "{{" in query.legend else ""
    shown = [f"{one['metric'].get(label, '')} {float(one['value'][1]):.4g}".strip() for one in result]
    return ", ".join(shown[:9]) + (", ..." if len(shown) > 9 else "")


@contextmanager
def _server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "fastblt", "serve", "--port", str(port), "--cache-size", "256MiB"]
    process = subprocess.Popen(command, cwd=DEPLOY.parent)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
