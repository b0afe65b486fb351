"""The command `fastblt`: the server's commands, and `bench` and `eval`, which the server must not import."""

from __future__ import annotations

from fastblt.benchmarks.bench import app as bench
from fastblt.benchmarks.evaluation.command import app as evaluation
from fastblt.server.cli import app

app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")
