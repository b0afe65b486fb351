"""Turns measurements into commands: options, a JSON file that records the machine, and comparison of checkouts.

A measurement is a function that prints its tables and returns a dict. Its parameters become options:

    def measure(*, model: str = str(PRETRAINED), requests: int = 32, rounds: int = 3) -> dict[str, Any]: ...

    app = command(measure)

    if __name__ == "__main__":
        app()

With this, `python -m fastblt.benchmarks.FOLDER.FILE` has the options

    --requests 8 --rounds 5     the function's parameters; the option of a list is repeated for each item
    --json FILE                 also write the dict to FILE, with date, machine, versions and checkpoint
    --against CHECKOUT          also measure with the models, kernels and server of another checkout
    --turns 3                   how often each checkout is measured, in turns; ratios are of medians

Both checkouts are measured by this checkout's scripts, in a new process for each turn. So CHECKOUT needs only the names
that the script imports, and a folder `src/fastblt` like this repository's:

    git worktree add ../before COMMIT
    python -m fastblt.benchmarks.engine.speed auto --setting blt --setting 'blt-s k16' --rounds 1 --against ../before

A dict with `passed: False`, as checks return it, makes the exit status 1.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from fastblt.benchmarks.machine import measured_with, write_json
from fastblt.benchmarks.markdown import Table

Measure = Callable[..., dict[str, Any]]

_HERE = Path(__file__).resolve().parents[1]
_JSON = Annotated[Path | None, typer.Option("--json", help="File for the result.", dir_okay=False)]
_AGAINST = Annotated[Path | None, typer.Option(help="Another checkout to compare with.", exists=True, file_okay=False)]
_TURNS = Annotated[int, typer.Option(min=1, help="Processes of each checkout, in turns.")]
_OWN = {"json_path": (_JSON, None), "against": (_AGAINST, None), "turns": (_TURNS, 3)}


def command(*measures: Measure) -> typer.Typer:
    """A command for one measurement, or one with a subcommand for each. The module's docstring is the help text."""
    module = inspect.getmodule(measures[0])
    # \b tells click not to rewrap a paragraph.
    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in ((module and module.__doc__) or "").split("\n\n"))
    options = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
    app = typer.Typer(help=text, no_args_is_help=len(measures) > 1, **options)  # type: ignore[arg-type]
    for measure in measures:
        app.command(help=None if len(measures) > 1 else text)(_with_output(measure))
    return app


def _with_output(measure: Measure) -> Callable[..., None]:
    """The measurement with the options --json, --against and --turns added."""

    @functools.wraps(measure)
    def run(
        *positional: Any, json_path: Path | None = None, against: Path | None = None, turns: int = 3, **own: Any
    ) -> None:
        if against is not None:
            module = inspect.getmodule(measure)
            assert module is not None and module.__spec__ is not None, "start it by python -m"
            arguments = _without(sys.argv[1:], ("--json", "--against", "--turns"))
            result = compare(module.__spec__.name, arguments, against, turns)
        else:
            result = measure(*positional, **own)
        if json_path is not None:
            write_json(json_path, measured_with(own.get("model")) | result)
        if result.get("passed") is False:
            raise typer.Exit(1)

    kind = inspect.Parameter.KEYWORD_ONLY
    given = inspect.signature(measure, eval_str=True).parameters.values()
    added = [inspect.Parameter(name, kind, default=value, annotation=hint) for name, (hint, value) in _OWN.items()]
    # For options that may be repeated, typer accepts lists but no other sequences.
    lists = {one.name: list[get_args(one.annotation)] for one in given if get_origin(one.annotation) is Sequence}  # type: ignore[misc]
    parameters = [*(one.replace(annotation=lists.get(one.name, one.annotation)) for one in given), *added]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def compare(module: str, arguments: Sequence[str], checkout: Path, turns: int) -> dict[str, Any]:
    """Run a command of `module` with both checkouts, in turns. Returns all numbers of their results.

    Prints medians and ratios. Raises RuntimeError if a run fails.
    """
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "there").mkdir()
        paths = {"against": _mixed(checkout, folder / "there"), "here": str(_HERE / "src")}
        for _ in range(turns):
            for which, path in paths.items():
                environment = os.environ | {"PYTHONPATH": path}
                run = [sys.executable, "-P", "-m", module, *arguments, "--json", str(folder / "result.json")]
                if subprocess.run(run, env=environment, stdout=subprocess.DEVNULL).returncode:
                    raise RuntimeError(
                        f"the measurement fails with {checkout if which == 'against' else 'this checkout'}"
                    )
                for name, value in _numbers(json.loads((folder / "result.json").read_text())):
                    found.setdefault(name, {}).setdefault(which, []).append(value)
    both = {name: values for name, values in found.items() if len(values) == 2}
    table = Table("figure", "there", "here", "here / there")
    for name, values in both.items():
        before, after = (statistics.median(values[which]) for which in ("against", "here"))
        table.row(name, f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}" if before else "-")
    return {"turns": turns, "arguments": list(arguments), "figures": both}


def _mixed(checkout: Path, folder: Path) -> str:
    """Make a package `fastblt` of another checkout with this one's benchmarks. Returns the folder for PYTHONPATH."""
    package = folder / "fastblt"
    package.mkdir()
    for path in (checkout.resolve() / "src" / "fastblt").iterdir():
        if path.name != "benchmarks":
            (package / path.name).symlink_to(path.resolve())
    (package / "benchmarks").symlink_to(Path(__file__).resolve().parent)
    return str(folder)


def _numbers(result: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a result's nested dicts, without those of the machine, each with its path."""
    if isinstance(result, dict):
        for name, value in result.items():
            if path or name not in ("machine", "versions"):
                yield from _numbers(value, f"{path}, {name}" if path else str(name))
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield path, float(result)


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in options:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


@contextmanager
def clean_errors(extra: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Show errors that a user can cause as one line, and exit. `extra` names the extra with the needed packages."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"fastblt: {interrupted}", err=True)
        raise typer.Exit(130) from None
    except ImportError as error:
        _fail(f"{error}; install fastblt[{extra}]")
    except (ValueError, OSError, RuntimeError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    typer.echo(f"fastblt: {message}", err=True)
    raise typer.Exit(1)
