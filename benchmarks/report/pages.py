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
from fastblt.benchmarks.report import engine_tables, gpu_tables, load_tables, method_tables, narrow_tables
from fastblt.benchmarks.report.facts import Results, headline
from fastblt.server.settings import PRETRAINED

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "benchmarks"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "operations", "performance")))

_MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_ALL = "fastblt bench all --traces FOLDER"
_GPU = "python -m fastblt.benchmarks.savings.gpu_prediction"
_CONSTRAINTS = "python -m fastblt.benchmarks.checks.constraints --outputs 100 --utf8 500"


@dataclass(frozen=True)
class Table:
    """A table of a page. `command` made the files that match the patterns `files` under docs/benchmarks. `render` gets
    their contents by file stem."""

    command: str
    files: tuple[str, ...]
    render: Callable[[Results], str]


TABLES = {
    "headline": Table(_ALL, ("report/*.json",), lambda results: table(("measured", ""), headline(results))),
    "capacity": Table(_ALL, ("report/sweep-auto-*.json",), load_tables.capacity),
    "saved": Table(_ALL, ("report/methods-*.json",), method_tables.saved),
    "drafts": Table(_ALL, ("report/methods-*-b8.json",), method_tables.drafts),
    "latent": Table(_ALL, ("report/methods-*-b8.json",), method_tables.latent),
    "predicted": Table(
        "python -m fastblt.benchmarks.savings.roofline --rounds 5", ("roofline.json",), method_tables.predicted
    ),
    "predicted-alone": Table(
        "python -m fastblt.benchmarks.savings.roofline --batch 1 --length 512 --rounds 5",
        ("roofline-512.json",),
        method_tables.predicted,
    ),
    "narrow": Table(
        "python -m fastblt.benchmarks.savings.narrow --batch 1 --length 32 --rounds 2 --budget 0.03",
        ("narrow-1b.json",),
        narrow_tables.speed,
    ),
    "narrow-large": Table("python -m fastblt.benchmarks.load.large FOLDER", ("large-*.json",), narrow_tables.large),
    "narrow-quality": Table(
        "python -m fastblt.benchmarks.checks.weights --num-prompts 12 --output-len 64",
        ("weights.json",),
        narrow_tables.quality,
    ),
    "maps": Table("python -m fastblt.benchmarks.kernels.maps --rounds 2", ("maps.json",), narrow_tables.maps),
    "streams": Table(_ALL, ("report/sweep-*.json",), load_tables.streams),
    "traces": Table(_ALL, ("report/trace-*.json", "report/saturation-*.json"), load_tables.traces),
    "peers": Table(_ALL, ("report/peer-*.json",), load_tables.peers),
    "front": Table("python -m fastblt.benchmarks.load.front --rounds 4", ("front.json",), load_tables.front),
    "page": Table("python -m fastblt.benchmarks.load.page --num-prompts 96", ("page.json",), load_tables.page),
    "soak": Table("python -m fastblt.benchmarks.checks.soak", ("soak.json",), load_tables.soak),
    "auto": Table("python -m fastblt.benchmarks.engine.speed auto --rounds 7", ("auto.json",), method_tables.auto),
    "overhead": Table(
        "python -m fastblt.benchmarks.engine.speed overhead --rounds 5", ("overhead.json",), engine_tables.overhead
    ),
    "host-time": Table(
        "python -m fastblt.benchmarks.engine.host_time --steps 150 --rounds 6",
        ("host_time.json",),
        engine_tables.host_time,
    ),
    "holding": Table("python -m fastblt.benchmarks.engine.holding weights", ("holding.json",), engine_tables.holding),
    "hold-time": Table(
        "python -m fastblt.benchmarks.engine.holding latency", ("hold_sweep.json",), engine_tables.hold_time
    ),
    "lossless": Table(
        "python -m fastblt.benchmarks.checks.lossless --processes 2", ("lossless.json",), engine_tables.lossless
    ),
    "modes": Table(
        "python -m fastblt.benchmarks.engine.speed modes --rounds 2", ("modes.json",), engine_tables.default_mode
    ),
    "gpu-kernels": Table(_GPU, ("gpu_prediction.json",), gpu_tables.kernels),
    "gpu-rounds": Table(_GPU, ("gpu_prediction.json",), gpu_tables.rounds),
    "gpu-predicted": Table(_GPU, ("gpu_prediction.json",), gpu_tables.predicted),
    "gpu-arithmetic": Table(_GPU, ("gpu_prediction.json",), gpu_tables.arithmetic),
    "schemas": Table(_CONSTRAINTS, ("constraints.json",), engine_tables.schemas),
    "utf8": Table(_CONSTRAINTS, ("constraints.json",), engine_tables.utf8),
    "constraint-cost": Table(_CONSTRAINTS, ("constraints.json",), engine_tables.constraint_cost),
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
    return f"{one.render(results)}\n\n`{one.command}`; {links}; {_origin(results)}."


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
