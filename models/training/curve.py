"""Checks that a run's first steps equal the published ones: the same text, and every point of the curve within 1 %.

python -m fastblt.models.training.curve runs/again

docs/training.md has the command of the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).with_name("first_steps.json")
TOLERANCE = 0.01
FIGURES = ("bits", "masked", "masked_nats", "loss")


def read_run(work: Path, steps: int) -> dict[str, Any]:
    """The digest of the text and the points of the training curve in a working folder, up to step `steps`."""
    lines = (work / "blt" / "curve.jsonl").read_text().splitlines()
    points = [row for line in lines if (row := json.loads(line))["step"] <= steps]
    return {
        "sha256": json.loads((work / "data" / "corpus.json").read_text())["sha256"],
        "points": [{name: row[name] for name in ("step", *FIGURES)} for row in points],
    }


def deviations(published: dict[str, Any], found: dict[str, Any]) -> list[tuple[int, str, float]]:
    """(step, name of the figure, relative deviation) for every figure of every published point.

    Raises ValueError if the texts differ or points are missing.
    """
    if published["sha256"] != found["sha256"]:
        raise ValueError(f"the run's text is {found['sha256']}, the published one {published['sha256']}")
    points = {point["step"]: point for point in found["points"]}
    if missing := [point["step"] for point in published["points"] if point["step"] not in points]:
        raise ValueError(f"the run has no points for steps {missing}")
    return [
        (point["step"], name, abs(points[point["step"]][name] / point[name] - 1))
        for point in published["points"]
        for name in FIGURES
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="working folder of the run")
    parser.add_argument("--publish", action="store_true", help="make its first steps, up to 200, the published ones")
    args = parser.parse_args(argv)
    found = read_run(args.work, 200)
    if args.publish:
        PUBLISHED.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    try:
        rows = deviations(json.loads(PUBLISHED.read_text()), found)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    step, name, worst = max(rows, key=lambda row: row[2])
    print(f"{len(rows)} figures; the largest deviation is {worst:.2%}, of `{name}` at step {step}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
