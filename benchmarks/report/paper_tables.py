"""The paper's tables 3 to 10 (arXiv 2605.08044) beside this project's measurements at the same shape."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from fastblt.benchmarks.markdown import percent, table
from fastblt.benchmarks.report.facts import Results

#: One row for each task, scale, model and setting of the paper's tables.
PAPER = Path(__file__).resolve().parents[1] / "data" / "paper_tables.csv"
_SCALE, _CHIP = "1B", "H200"


def beside(results: Results) -> str:
    """For each setting: acceptance, passes over BLT's, and GB saved, of the paper (means over its tasks at 1B) and here
    at that shape. Then the time saved on this machine, and the prediction for a GPU, which the paper has not."""
    run = results["methods-1b-b1"]["batches"]["1"]["settings"]
    predicted = results["gpu_prediction"]["predicted"]
    paper = _paper()
    plain = run["blt"]
    rows = []
    for name, row in run.items():
        if name == "blt" or name.endswith(("paper", "aligned")):
            continue
        theirs = paper.get(name, {})
        on_chip = predicted.get(f"{_SCALE.lower()}, {_CHIP}, {name}")
        saved_there = (
            "" if on_chip is None else percent(1 - predicted[f"{_SCALE.lower()}, {_CHIP}, blt"]["1"] / on_chip["1"])
        )
        rows.append(
            [
                name,
                _pair(theirs.get("accept"), None if row["acceptance"] is None else 100 * row["acceptance"]),
                _pair(theirs.get("dec"), 100 * row["decoder_per_byte"] / plain["decoder_per_byte"]),
                _pair(theirs.get("glob"), 100 * row["upstream_per_byte"] / plain["upstream_per_byte"]),
                _pair(theirs.get("gb"), 100 * row["gb_paper_saved"]),
                percent(row["time_saved"]),
                saved_there,
            ]
        )
    columns = (
        *("1B, one request: the paper / here", "accepted, %", "decoder passes, % of `blt`'s", "global passes, %"),
        *("GB saved, %", "time saved here, %", f"time saved on an {_CHIP}, predicted, %"),
    )
    return table(columns, rows)


def _paper() -> dict[str, dict[str, float]]:
    """By setting, means over the tasks at one scale. Passes are in percent of BLT's, GB in percent saved."""
    with PAPER.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["scale"] == _SCALE]
    base = {line["task"]: line for line in lines if line["setting"] == "AR"}
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line["setting"] == "AR":
            continue
        size = "" if line["method"] == "BLT-S" else f"-{line['B_or_k']}"
        values = found.setdefault(f"{line['method'].lower()}{size} {line['setting']}", {})
        if line["accept"]:
            values.setdefault("accept", []).append(float(line["accept"]))
        for key in ("dec", "glob"):
            values.setdefault(key, []).append(100 * float(line[key]) / float(base[line["task"]][key]))
        values.setdefault("gb", []).append(100 - 100 * float(line["gb"]) / float(base[line["task"]]["gb"]))
    return {name: {key: statistics.mean(each) for key, each in values.items()} for name, values in found.items()}


def _pair(theirs: float | None, ours: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:.0f}" for value in (theirs, ours))
