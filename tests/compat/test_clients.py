"""The examples of docs/clients.md and the README run against a server of the shipped model, and all write the same.

Clients live in an environment of their own, which CLIENTS names (`make compat` makes it): each wants other versions of
what it shares with the others. Without it only what curl and OpenAI's client ask is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.compat.conftest import KEY
from tests.docs.pages import ROOT, code_blocks
from tests.server.api.running import until

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = "class Point:\n    def __init__(self, x, y):\n"
#: A folder of an environment with the clients: `bin/python`, and `node/node_modules`.
CLIENTS = Path(os.environ["CLIENTS"]) if "CLIENTS" in os.environ else None
SMALL = ("--cache-size", "64MiB", "--max-model-len", "2048", "--threads", "1", "--deterministic")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host and port of `fastblt serve`, without keys."""
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "fastblt", "serve", "--port", "0", *SMALL]
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: "ready: " in log.read_text() or process.poll() is not None, 120)
        found = re.search(r"127\.0\.0\.1:\d+", log.read_text())
        assert found and process.poll() is None, log.read_text()
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def text(served: str) -> str:
    """What the model writes after the prompt of all examples."""
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    return httpx.post(f"http://{served}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def run(command: list[str], cwd: Path | None = None, **more: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | more
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page: str, kind: str, word: str) -> list[str]:
    return [block for block in code_blocks(page, kind) if word in block]


def python_of(module: str) -> str:
    """An interpreter that has a client. Skips where there is none."""
    for python in ([str(CLIENTS / "bin" / "python")] if CLIENTS else []) + [sys.executable]:
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0:
            return python
    pytest.skip(f"{module} is not installed; `make compat` does it")


@pytest.mark.parametrize(
    "module", ["openai", "litellm", "langchain_openai", "llama_index.llms.openai_like"], ids=lambda name: name
)
def test_python_clients(served: str, text: str, module: str) -> None:
    [block] = [
        one for one in code_blocks(PAGE, "python") if re.search(rf"^(from|import) {module}\b", one, re.MULTILINE)
    ]
    written = run([python_of(module), "-c", block.replace("localhost:8000", served)])
    assert written.strip() == text.strip()


def test_openai_s_client_in_node(served: str, text: str, tmp_path: Path) -> None:
    if CLIENTS is None or shutil.which("node") is None or not (CLIENTS / "node" / "node_modules").exists():
        pytest.skip("openai for node is not installed; `make compat` does it")
    [block] = code_blocks(PAGE, "js")
    script = tmp_path / "ask.mjs"
    script.write_text(block.replace("localhost:8000", served))
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node" / "node_modules")
    assert run(["node", str(script)]) == text


def test_the_command_llm(served: str, text: str, tmp_path: Path) -> None:
    python = python_of("llm")
    [models] = blocks(PAGE, "yaml", "model_id")
    (tmp_path / "extra-openai-models.yaml").write_text(models.replace("localhost:8000", served))
    [command] = blocks(PAGE, "bash", "llm -m")
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    written = run(["bash", "-c", command], LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="none", PATH=path)
    assert written.strip() == text.strip()


def test_curl_on_the_clients_page(served: str, text: str) -> None:
    [command] = blocks(PAGE, "bash", "curl localhost")
    answer = json.loads(run(["bash", "-c", command.replace("localhost:8000", served)]))
    assert answer["choices"][0]["text"] == text


def test_curl_and_openai_s_client_in_the_readme(served: str) -> None:
    commands = [block for block in code_blocks(README) if block.startswith("curl localhost:8000")]
    assert len(commands) == 2
    for command in commands:
        answer = json.loads(run(["bash", "-c", command.replace("localhost:8000", served)]))
        assert answer["choices"][0]["text"].strip()
    # The first shows what it gives.
    [shown] = code_blocks(README, "text")
    first = json.loads(run(["bash", "-c", commands[0].replace("localhost:8000", served)]))
    assert "while True:\n    line = file.readline()\n" + first["choices"][0]["text"].rstrip() == shown.rstrip()
    [block] = blocks(README, "python", "from openai import")
    assert run([python_of("openai"), "-c", block.replace("localhost:8000", served)]).strip()


def test_prometheus_scrapes_with_a_key(url: str, tmp_path: Path) -> None:
    """A server that wants a key, and the configuration of the page with an interval that a test can wait for."""
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed (Debian's package of that name)")
    [config] = blocks(PAGE, "yaml", "scrape_configs")
    (tmp_path / "key").write_text(KEY)
    path = tmp_path / "prometheus.yaml"
    config = config.replace("/etc/prometheus/fastblt.key", str(tmp_path / "key"))
    config = config.replace("localhost:8000", url.removeprefix("http://"))
    path.write_text("global:\n  scrape_interval: 1s\n" + config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [prometheus, f"--config.file={path}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    query = f"http://127.0.0.1:{port}/api/v1/query"

    def value(name: str) -> float | None:
        try:
            found = httpx.get(query, params={"query": name}).json()["data"]["result"]
        except httpx.TransportError:
            return None
        return float(found[0]["value"][1]) if found else None

    try:
        until(lambda: value('up{job="fastblt"}') == 1, 30)
        assert value("fastblt_num_requests_running") == 0
    finally:
        process.terminate()
        process.wait(30)


def test_guidellm_with_its_tokenizer(served: str, tmp_path: Path) -> None:
    pytest.importorskip("guidellm", reason="in the extra `compat`")
    [block] = [block for block in code_blocks(PAGE) if "guidellm run" in block]
    tokenizer, *command = block.replace("localhost:8000", served).splitlines()[1:]
    assert "ByT5Tokenizer" in tokenizer
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    few = "\n".join(command).replace("count=50", "count=4").replace("streams=8", "streams=2")
    for one in (tokenizer, few.replace("output_tokens=128", "output_tokens=16")):
        run(["bash", "-c", one], cwd=tmp_path, PATH=path, HF_HUB_OFFLINE="1")


def test_bench_serve(served: str) -> None:
    [command] = [
        line for block in code_blocks(PAGE) for line in block.splitlines() if line.startswith("fastblt bench serve")
    ]
    words = command.replace("localhost:8000", served).replace("--num-prompts 20", "--num-prompts 4").split()
    assert "bytes" in run([sys.executable, "-m", *words])
