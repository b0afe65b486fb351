"""Puts the headline figures of the full run into the README, between two marks.

python -m fastblt.benchmarks.report.readme            write them
python -m fastblt.benchmarks.report.readme --check    say whether they are those of the JSON files
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fastblt.benchmarks.report.facts import Results, headline
from fastblt.benchmarks.report.parts import load_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "proof"
_BEGIN, _END = "<!-- figures: begin -->", "<!-- figures: end -->"


def block(results: Results) -> str:
    """The README's lines between the marks."""
    if not results:
        return "The full run (`fastblt bench all`) has not been made for this checkpoint."
    rows = [f"| {name} | {value} |" for name, value in headline(results)]
    machines = {f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in results.values()}
    return "\n".join(["| measured | |", "|---|---|", *rows, "", f"On {'; '.join(sorted(machines))}."])


def with_block(text: str, results: Results) -> str:
    """A README with the figures of the results. Raises ValueError where it has no place for them."""
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the README lacks the marks {_BEGIN} and {_END}")
    return pattern.sub(lambda _: f"{_BEGIN}\n{block(results)}\n{_END}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where figures differ")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = with_block(text, load_results(RESULTS))
    if args.check:
        sys.exit(int(new != text))
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
