"""The whole command `fastblt`: the server's commands, and what measures them, which stands above the server."""

from __future__ import annotations

from benchmarks.command import app as bench
from benchmarks.evaluation.command import app as evaluation
from server.cli import app

app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
