"""Runs the parts that are missing or out of date, each in its own process, and stores the command with each result."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.machine import checkpoint_digest, write_json
from fastblt.benchmarks.report.parts import Part, Plan, load_results, missing

Say = Callable[[str], None]


def run_parts(plan: Plan, folder: Path, *, only: str = "", large: bool = True, say: Say = print) -> dict[str, str]:
    """Run the parts that are due, with results in `folder`. Returns the parts that were not run, with reasons."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = checkpoint_digest(Path(plan.model))
    left: dict[str, str] = {}
    wanted = [part for part in plan.parts if only in part.name and (large or not part.large)]
    for kind, group in _grouped(wanted):
        due = []
        for part in group:
            if packages := missing(part):
                left[part.name] = f"needs {', '.join(packages)}: install fastblt[peers]"
            elif fresh(part, folder, digest, plan):
                say(f"{part.name}: done before")
            else:
                due.append(part)
        if due:
            try:
                with _server(kind, plan.model) as (url, about):
                    left |= _run(due, folder, digest, plan, url, about, say)
            except RuntimeError as error:
                left |= {part.name: str(error) for part in due if part.name not in left}
    for name, reason in left.items():
        say(f"{name}: not run ({reason.strip().splitlines()[-1]})")
    return left


def _grouped(parts: list[Part]) -> Iterator[tuple[tuple[str, ...] | None, list[Part]]]:
    """Groups of adjacent parts with the same server."""
    group: list[Part] = []
    for part in parts:
        if group and group[0].server != part.server:
            yield group[0].server, group
            group = []
        group.append(part)
    if group:
        yield group[0].server, group


def _key(part: Part, folder: Path, digest: str, plan: Plan) -> dict[str, Any]:
    """What identifies a part's result: the command, without machine-specific paths and port, and the checkpoint."""
    command = part.command(load_results(folder), "URL")
    if plan.traces is not None:
        # The path of the traces depends on the machine.
        command = [argument.replace(str(plan.traces), "TRACES") for argument in command]
    command = ["MODEL" if argument == plan.model else argument for argument in command]
    key = {"command": command, "checkpoint": digest, "model": Path(plan.model).name}
    return key | ({"rounds": part.rounds} if part.rounds > 1 else {})


def fresh(part: Part, folder: Path, digest: str, plan: Plan) -> bool:
    """Whether a part's result exists and was made by this command with the checkpoint of this digest."""
    path = folder / f"{part.name}.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["part"] == _key(part, folder, digest, plan))
    except (OSError, ValueError, KeyError, LookupError):
        return False


def _run(
    parts: list[Part], folder: Path, digest: str, plan: Plan, url: str, about: dict[str, Any], say: Say
) -> dict[str, str]:
    """Run the parts of one server, round by round. Returns the parts that failed, with reasons."""
    failed: dict[str, str] = {}
    results: dict[str, list[dict[str, Any]]] = {part.name: [] for part in parts}
    for turn in range(max(part.rounds for part in parts)):
        for part in parts:
            if turn >= part.rounds or part.name in failed:
                continue
            start = time.monotonic()
            try:
                key = _key(part, folder, digest, plan)
                results[part.name].append(_result(part.command(load_results(folder), url)))
            except (LookupError, RuntimeError) as error:
                failed[part.name] = str(error.args[0])
                continue
            say(f"{part.name}: {time.monotonic() - start:.0f} s")
            if turn == part.rounds - 1:
                # Our description of the server replaces what the server says of itself.
                result = {"part": key, **_without_lists(_median(results[part.name])), **about}
                write_json(folder / f"{part.name}.json", result)
    return failed


def _result(arguments: list[str]) -> dict[str, Any]:
    """Run a command. Returns the JSON that it writes. Raises RuntimeError if it fails or writes none."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", *arguments, "--json", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode or not out.exists():
            raise RuntimeError(done.stderr or _reason(out) or f"status {done.returncode}")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def _reason(out: Path) -> str:
    """Which of its criteria a check says did not hold; empty if it does not say."""
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    missed = [name for name, holds in report.get("criteria", {}).items() if not holds]
    return f"these criteria did not hold: {', '.join(missed)}" if missed else ""


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median of output bytes a second. With several rounds, the rates of all are added."""
    if len(results) == 1:
        return results[0]
    rates = [result["output_byte_throughput"] for result in results]
    middle = sorted(range(len(rates)), key=lambda turn: rates[turn])[len(rates) // 2]
    return results[middle] | {"output_byte_throughputs": rates}


#: Long lists with a value for each request, which the report does not need.
_LISTS = (
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors"),
    "generated_texts",
)


def _without_lists(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in _LISTS}


@contextmanager
def _server(kind: tuple[str, ...] | None, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run a server of this kind. Yields its URL and a description; both are empty if `kind` is None."""
    if kind is None:
        yield "", {}
    elif kind[0] == "fastblt":
        options = [*kind[1:], "--max-waiting", "4096"]
        with serving(model, options) as server:
            command = f"fastblt serve {' '.join(options)}"
            yield server.url, {"server": "fastblt", "server_command": command}
    else:
        from fastblt.benchmarks.report.peers import llama_server, transformers_server

        with (llama_server if kind[0] == "llama.cpp" else transformers_server)(model) as (url, about):
            yield url, about
