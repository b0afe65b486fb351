"""How commands end: one line for what a user can cause."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


@contextmanager
def clean_errors() -> Iterator[None]:
    """What a user can cause ends in one line; what only a bug can cause keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        fail(str(error) or type(error).__name__)


def fail(message: str) -> NoReturn:
    typer.echo(f"fastblt: {message}", err=True)
    raise typer.Exit(1)


def quiet_openmp() -> None:
    # Must be set before torch is imported. Threads that spin while they wait cost their neighbors whole time slices.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
