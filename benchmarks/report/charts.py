"""The report's charts: PNG files made from the JSON results. A chart without data is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

from fastblt.benchmarks.labels import name_points
from fastblt.benchmarks.palette import METHODS, SERIES
from fastblt.benchmarks.report.facts import Results, lossless, method_runs, title

_STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=SERIES),
}


def draw_all(results: Results, folder: Path) -> list[str]:
    """Write the charts for which there is data. Returns their file names in the report's order."""
    charts: dict[str, Callable[[Results], Figure | None]] = {
        "throughput.png": throughput,
        "savings.png": savings,
        "predicted.png": predicted,
        "acceptance.png": acceptance,
        "roofline.png": roofline,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for name, draw in charts.items():
            (folder / name).unlink(missing_ok=True)
            figure = draw(results)
            if figure is not None:
                # No metadata that changes: the same results give the same file.
                figure.savefig(folder / name, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                written.append(name)
    return written


def throughput(results: Results) -> Figure | None:
    """Time per byte and time to the first byte against output bytes a second, for numbers of streams."""
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, result in results.items():
        if name.startswith("sweep-"):
            method, streams = name.removeprefix("sweep-").rsplit("-c", 1)
            series.setdefault(method, []).append((int(streams), result))
    if not series:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    names: list[tuple[float, float, str]] = []
    for method, points in series.items():
        points.sort(key=lambda point: point[0])
        rate = [result["output_byte_throughput"] for _, result in points]
        color = METHODS.get(method, SERIES[-1])
        left.plot(rate, [result["median_tpob_ms"] for _, result in points], marker="o", label=method, color=color)
        right.plot(rate, [result["p99_ttft_ms"] for _, result in points], marker="o", label=method, color=color)
        for (count, result), x in zip(points, rate, strict=True):
            names.append((x, result["median_tpob_ms"], str(count)))
    heading = "Time per byte (numbers: streams at once)"
    left.set(xlabel="output, bytes a second", ylabel="ms a byte, median", title=heading)
    right.set(xlabel="output, bytes a second", ylabel="ms, 99th percentile", title="Time to the first byte")
    left.legend()
    figure.tight_layout()
    name_points(left, names, 7)
    return figure


def savings(results: Results) -> Figure | None:
    """Weights, predicted time and measured time saved by each setting, with a panel for each run."""
    runs = list(method_runs(results))
    if not runs:
        return None
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.9 * lines), squeeze=False, sharex=True)
    kinds = (
        ("weights_saved", "weights read"),
        ("predicted_saved", "time, predicted"),
        ("time_saved", "time, measured"),
    )
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    for axis, (part, batch, run) in zip(axes.flat, runs, strict=False):
        rows = {name: row for name, row in run["settings"].items() if _shown(name)}
        for offset, (key, label) in enumerate(kinds):
            at = [index + 0.27 * (offset - 1) for index in range(len(rows))]
            # Losses of more than 100 % are cut off, to keep the scale.
            axis.barh(at, [max(-100, 100 * row[key]) for row in rows.values()], height=0.25, label=label)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title(part, batch), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("% of BLT saved")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.02 - 0.02 / lines))
    figure.tight_layout()
    return figure


def predicted(results: Results) -> Figure | None:
    """Predicted over measured time, by setting and run."""
    runs = list(method_runs(results))
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(10, 4))
    for at, (part, batch, run) in enumerate(runs):
        rows = {name: row for name, row in run["settings"].items() if _shown(name, plain=True)}
        shares = [row["predicted_over_measured"] for row in rows.values()]
        # There are fewer colors than runs.
        marker = "os^"[at // len(SERIES) % 3]
        axis.plot(list(rows), shares, marker=marker, linestyle="none", label=title(part, batch))
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.axhspan(0.9, 1.1, color=SERIES[2], alpha=0.12)
    axis.set(ylabel="predicted / measured", title="Time that the passes should take, over the time taken (band: 10 %)")
    axis.tick_params(axis="x", rotation=45)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def acceptance(results: Results) -> Figure | None:
    """Share of drafted bytes accepted by their position in the draft."""
    runs = [
        (part, run)
        for part, batch, run in method_runs(results)
        if batch == "8" and part in ("methods-greedy-b8", "methods-sampled-b8")
    ]
    if not runs:
        return None
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.8), squeeze=False, sharey=True)
    for axis, (part, run) in zip(axes.flat, runs, strict=True):
        for name, row in run["settings"].items():
            if _shown(name) and "acceptance_by_position" in row:
                shares = [100 * share for share in row["acceptance_by_position"]]
                axis.plot(range(1, len(shares) + 1), shares, marker=".", label=name)
        axis.set(xlabel="position in the draft", ylim=(0, 102), title=title(part, "8"))
    axes.flat[0].set_ylabel("% accepted up to there")
    axes.flat[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def roofline(results: Results) -> Figure | None:
    """The time of a pass by rows, with the machine's limit for reading and multiplying its weights."""
    names = [name for name in ("methods-greedy-b32", "methods-1b-b8", "methods-3b-b1") if name in results]
    if not names:
        return None
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    labels = {"upstream": "global", "decode": "decoder", "encode": "encoder", "entropies": "entropy model"}
    for axis, name in zip(axes.flat, names, strict=True):
        [(batch, run)] = results[name]["batches"].items()
        curve = run["curve"]
        for color, (module, label) in zip(SERIES, labels.items(), strict=False):
            axis.plot(curve["rows"], [1000 * t for t in curve["seconds"][module]], marker=".", color=color, label=label)
            floor = [1000 * _floor(curve, module, rows) for rows in curve["rows"]]
            axis.plot(curve["rows"], floor, linestyle="--", color=color, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="rows of the pass", title=title(name, batch).split(",")[0])
    axes.flat[0].set_ylabel("ms (dashed: the machine's limit)")
    axes.flat[-1].legend()
    figure.tight_layout()
    return figure


def _floor(curve: dict[str, Any], module: str, rows: int) -> float:
    """Seconds to read a module's fp32 weights once or to multiply them by the rows, whichever is longer."""
    weights = curve["weights"][module]
    limits = curve["limits"]
    return max(4e-9 * weights / limits["read_gb_s"], 2e-9 * weights * rows / limits["gflop_s"])


def _shown(name: str, *, plain: bool = False) -> bool:
    """Whether a setting is shown in charts, which have only some of each method. `plain`: whether BLT is."""
    if name == "blt":
        return plain
    return (lossless(name) and (name.startswith("blt-s") or name.endswith("1step"))) or name.endswith(" a0.7")
