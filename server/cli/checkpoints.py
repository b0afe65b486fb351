"""Commands that make checkpoints: `convert`, `widen`, `train` and `average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastblt.server.cli.errors import clean_errors, quiet_openmp
from fastblt.server.cli.options import Dtype


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the official model.")],
    entropy: Annotated[Path, typer.Argument(help="Folder of its entropy model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Turn the official repositories' checkpoints into one that can be served."""
    with clean_errors():
        from fastblt.models.convert import convert as run

        run(source, entropy, output)
        typer.echo(f"wrote {output}")


def widen(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    output: Annotated[
        Path, typer.Argument(help="Folder to write: in float32 6 GB for 1b, 12 GB for 3b, 27 GB for 7b.")
    ],
    shape: Annotated[str, typer.Option(help="1b or 3b, the paper's, or 7b.")] = "1b",
    weights: Annotated[Dtype, typer.Option(help="How they are written.")] = Dtype.FLOAT32,
    patcher: Annotated[
        bool, typer.Option("--patcher", help="Widen the entropy model too, to the published one's 100 million weights.")
    ] = False,
) -> None:
    """Widen a checkpoint to a large shape that computes the same: real acceptance at a large model's cost."""
    quiet_openmp()
    with clean_errors():
        import torch

        from fastblt.models.widen import paper_shape, widen_checkpoint

        widen_checkpoint(source, output, paper_shape(shape, patcher=patcher), getattr(torch, weights))
        typer.echo(f"wrote {output}")


def train(context: typer.Context) -> None:
    """Train a model; `fastblt train --help` lists the options."""
    quiet_openmp()
    from fastblt.models.training.train import main as run

    raise typer.Exit(run(context.args))


def average(
    sources: Annotated[list[str], typer.Argument(help="Checkpoint folders or Hub ids, trained on from one.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Average the weights of runs that went on from the same checkpoint: as a rule better than each of them."""
    with clean_errors():
        from fastblt.models.training.average import average as run

        run(sources, output)
        typer.echo(f"wrote {output}")
