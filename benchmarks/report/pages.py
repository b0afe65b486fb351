"""Fills the tables of README.md and of pages under docs from the JSON files under docs/benchmarks.

    python -m fastblt.benchmarks.report.pages            write them
    python -m fastblt.benchmarks.report.pages --check    change nothing; status 1 where a page and its JSON differ

A table is between `<!-- table: NAME -->` and `<!-- end -->`. `TABLES` has the source of each NAME.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastblt.benchmarks.machine import checkpoint_digest
from fastblt.benchmarks.markdown import day, table
from fastblt.benchmarks.report import engine_tables, gpu_tables, load_tables, method_tables, narrow_tables, paper_tables
from fastblt.benchmarks.report.facts import Results, headline
from fastblt.server.settings import PRETRAINED

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "benchmarks"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "methods", "operations", "performance")),
)

_MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_HEADLINE = ("methods-*.json", "sweep-*.json", "trace-*.json", "peer-*.json")


@dataclass(frozen=True)
class Table:
    """A table of a page, made of the files under docs/benchmarks that match the patterns `files`. `render` gets their
    contents by file stem. `fastblt bench all` makes the files, unless there is another `command`."""

    files: tuple[str, ...]
    render: Callable[[Results], str]
    command: str | None = None


TABLES = {
    "headline": Table(_HEADLINE, lambda results: table(("measured", ""), headline(results))),
    "capacity": Table(("sweep-auto-*.json",), load_tables.capacity),
    "saved": Table(("methods-*.json",), method_tables.saved),
    "limits": Table(("methods-*.json",), method_tables.limits),
    "quality": Table(("quality.json",), method_tables.quality),
    "winners": Table(
        ("methods-*.json", "gpu_prediction.json"), method_tables.winners, "fastblt bench all --only methods"
    ),
    "drafts": Table(("methods-*-b8.json",), method_tables.drafts),
    "latent": Table(("methods-greedy-b8.json", "methods-sampled-b8.json"), method_tables.latent),
    "paper": Table(
        ("methods-1b-b1.json", "gpu_prediction.json"), paper_tables.beside, "fastblt bench all --only methods-1b"
    ),
    "predicted": Table(("roofline.json",), method_tables.predicted),
    "predicted-alone": Table(("roofline-512.json",), method_tables.predicted),
    "narrow": Table(("narrow-1b.json",), narrow_tables.speed),
    "narrow-large": Table(("large-*.json",), narrow_tables.large),
    "narrow-quality": Table(("weights.json",), narrow_tables.quality),
    "keys-values": Table(("keys_values.json",), narrow_tables.keys_values),
    "maps": Table(("maps.json",), narrow_tables.maps),
    "peer-loop": Table(("peer_loop.json",), narrow_tables.peer_loop),
    "streams": Table(("sweep-*.json",), load_tables.streams),
    "traces": Table(("trace-*.json",), load_tables.traces),
    "token-loop": Table(("token_loop.json",), load_tables.token_loop),
    "first-picture": Table(("first_picture.json",), load_tables.first_picture),
    "peers": Table(("peer-*.json",), load_tables.peers),
    "fairness": Table(("fairness-*.json",), load_tables.fairness),
    "starvation": Table(("starvation.json",), load_tables.starvation),
    "front": Table(("front.json",), load_tables.front),
    "page": Table(("page.json",), load_tables.page),
    "soak": Table(("soak.json",), load_tables.soak),
    "auto": Table(("auto.json",), method_tables.auto),
    "fresh": Table(("fresh.json",), method_tables.fresh),
    "overhead": Table(("overhead.json",), engine_tables.overhead),
    "host-time": Table(("host_time.json",), engine_tables.host_time),
    "holding": Table(("holding.json",), engine_tables.holding),
    "hold-time": Table(("hold_sweep.json",), engine_tables.hold_time),
    "lossless": Table(("lossless.json",), engine_tables.lossless),
    "modes": Table(("modes.json",), engine_tables.default_mode),
    "gpu-kernels": Table(("gpu_prediction.json",), gpu_tables.kernels),
    "gpu-rounds": Table(("gpu_prediction.json",), gpu_tables.rounds),
    "gpu-predicted": Table(("gpu_prediction.json",), gpu_tables.predicted),
    "gpu-arithmetic": Table(("gpu_prediction.json",), gpu_tables.arithmetic),
    "schemas": Table(("constraints.json",), engine_tables.schemas),
    "utf8": Table(("constraints.json",), engine_tables.utf8),
    "constraint-cost": Table(("constraints.json",), engine_tables.constraint_cost),
}


def files_of(one: Table) -> list[str]:
    """The files of a table, relative to docs/benchmarks, sorted by number: 8 before 32."""
    found = [name for pattern in one.files for name in glob.glob(pattern, root_dir=DATA)]
    return sorted(found, key=lambda name: [part.zfill(4) for part in re.split(r"(\d+)", name)])


def block(name: str, page: Path) -> str:
    """A table with a line about its source. Raises ValueError for an unknown table or one without files."""
    if name not in TABLES:
        raise ValueError(f"{page.name} has a place for a table {name!r}; there is none of that name")
    one = TABLES[name]
    results = {Path(file).stem: json.loads((DATA / file).read_text(encoding="utf-8")) for file in files_of(one)}
    if not results:
        raise ValueError(f"no file under docs/benchmarks matches {', '.join(one.files)}, of which {name} is made")
    links = ", ".join(f"[{pattern}]({_link(pattern, page)})" for pattern in one.files)
    command = one.command or " ".join(["fastblt bench all", *_only(list(results))])
    return f"{one.render(results)}\n\n`{command}`; {links}; {_origin(results)}."


def _only(names: list[str]) -> list[str]:
    """The options of `fastblt bench all` that make these files."""
    first, last = min(names), max(names)
    same = next((at for at, letter in enumerate(first) if letter != last[at]), len(first))
    common = first[:same].rstrip("-")
    traces = ["--traces FOLDER"] if any(name.startswith("trace-") for name in names) else []
    return traces + ([f"--only {common}"] if common else [])


def _link(pattern: str, page: Path) -> str:
    """The relative path to the file, or to the folder if the pattern has several."""
    target = DATA / pattern
    return os.path.relpath(target.parent if "*" in pattern else target, page.parent)


def _origin(results: Results) -> str:
    """The dates of results, and a note if they are of another checkpoint than the shipped one."""
    dates = sorted({day(result["date"]) for result in results.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    digests = {
        (result.get("part") or {}).get("checkpoint") or result.get("checkpoint", {}).get("sha256")
        for result in results.values()
    }
    # Without a digest: of no checkpoint.
    return when if digests <= {_shipped(), None} else f"{when}, an earlier checkpoint"


@cache
def _shipped() -> str:
    return checkpoint_digest(PRETRAINED)


def filled(text: str, page: Path) -> str:
    """A page's text with its tables made again."""
    return _MARK.sub(lambda mark: f"<!-- table: {mark[1]} -->\n{block(mark[1], page)}\n<!-- end -->", text)


def names_on(text: str) -> list[str]:
    """The names of the tables on a page."""
    return [mark[1] for mark in _MARK.finditer(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where figures differ")
    args = parser.parse_args()
    different = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text, page)
        if new != text:
            different.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    if different:
        print(f"{'differ' if args.check else 'wrote'}: {', '.join(different)}")
    sys.exit(int(args.check and bool(different)))


if __name__ == "__main__":
    main()
