"""Every command of the pages for users is run by a test, which is named here, or it is said why it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from fastblt.server.cli import app
from fastblt.server.cli.configuration import read_config
from tests.docs.pages import ROOT, code_blocks

PAGES = ("README", "docs/clients", "docs/offline", "docs/gpu", "docs/decoding", "docs/api", "docs/operations",
         "docs/running", "docs/evaluation", "docs/methods")  # fmt: skip

#: The beginning of a command, the test that runs it, and a word that this test must have.
RUN_BY = {
    "make serve": ("tests/server/cli/test_cli.py", '"serve"'),
    "pip install": ("tests/test_package.py", "build_wheel"),
    "fastblt serve": ("tests/server/cli/test_cli.py", '"serve"'),
    "fastblt generate": ("tests/server/cli/test_cli.py", '"generate"'),
    "fastblt convert": ("tests/models/test_convert.py", "convert"),
    "fastblt widen": ("tests/models/test_widen.py", "widen"),
    "fastblt train": ("tests/server/cli/test_cli.py", '"train"'),
    "fastblt eval humaneval": ("tests/benchmarks/evaluation/test_humaneval.py", "humaneval"),
    "fastblt eval flores": ("tests/benchmarks/evaluation/test_flores.py", "flores"),
    "fastblt bench serve": ("tests/compat/test_clients.py", "bench serve"),
    "python -m fastblt.benchmarks.evaluation.publish": ("tests/benchmarks/evaluation/test_publish.py", "publish"),
    "curl localhost": ("tests/compat/test_clients.py", "curl localhost"),
    "llm -m": ("tests/compat/test_clients.py", "llm -m"),
    "python -c 'from transformers": ("tests/compat/test_clients.py", "ByT5Tokenizer"),
    "guidellm run": ("tests/compat/test_clients.py", "guidellm run"),
}
#: Commands that no test runs.
NOT_RUN = {
    "make gpu-check": "it needs a GPU",
    "OPENAI_API_KEY=none lm_eval": "it downloads a task; tests/compat/test_lm_eval.py asks the harness for the rest",
}

_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:fastblt|make|pip|python|curl|llm|guidellm|lm_eval|kubectl|ray|docker) ")


def commands(page: str) -> list[str]:
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    # Assignments of Python are no commands.
    return [
        line for line in lines if (_COMMAND.match(line) or line == "fastblt serve") and not re.match(r"\w+ = ", line)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test(page: str) -> None:
    for line in commands(page):
        known = [start for start in (*RUN_BY, *NOT_RUN) if line.startswith(start)]
        assert known, line


@pytest.mark.parametrize("start", list(RUN_BY))
def test_the_tests_are_there(start: str) -> None:
    path, word = RUN_BY[start]
    assert word in (ROOT / path).read_text(encoding="utf-8")
    assert any(line.startswith(start) for page in PAGES for line in commands(page)), "no page has it any more"


@pytest.mark.parametrize("page", ["docs/operations", "docs/running"])
def test_configuration_files_are_taken(page: str, tmp_path: Path) -> None:
    [block] = code_blocks((ROOT / f"{page}.md").read_text(encoding="utf-8"), "toml")
    path = tmp_path / "fastblt.toml"
    path.write_text(block)
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", [], resilient_parsing=True)
    assert read_config(context, path) == path and context.default_map
