"""The charts of quality against speed, and of diversity against decoder passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.labels import name_points
from fastblt.benchmarks.palette import METHODS, SERIES
from fastblt.benchmarks.settings import family

_MARKERS = {0.8: "v", 0.9: "s", 0.95: "D", 1.0: "o"}


def quality(result: Record, file: Path, clock: str = "bytes_per_second") -> None:
    """Right bytes of the next line, and lines that parse, against bytes per second, for one and for many requests.

    `clock` names the speed: bytes_per_second (wall time), or bytes_per_processor_second, which depends little on other
    jobs of the machine.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row")
    titles = {"alone": "one request at a time", "together": f"{result['concurrency']} requests at a time"}
    shares = {"bytes_right": "bytes of the next line before the first wrong one", "parses": "share that parses"}
    named: list[tuple[Any, list[tuple[float, float, str]]]] = []
    unit = "bytes per second" + (" of processor time" if clock != "bytes_per_second" else "")
    for row, (share, words) in zip(axes, shares.items(), strict=True):
        for axis, where in zip(row, titles, strict=True):
            names: list[tuple[float, float, str]] = []
            for setting, found in result["settings"].items():
                x, y = found[where][clock], found[share]
                kind = family(setting)
                axis.scatter(x, y, color=METHODS.get(kind, SERIES[-1]), label=kind, s=28, zorder=3)
                names.append((x, y, setting.rpartition(" ")[2]))
            axis.grid(alpha=0.3)
            named.append((axis, names))
        # Leave room for names at the top.
        best = max(found[share] for found in result["settings"].values())
        row[0].set_ylim(0.75 * min(found[share] for found in result["settings"].values()), 1.15 * best or 1)
        row[0].set_ylabel(words)
    for axis, title in zip(axes[0], titles.values(), strict=True):
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel(unit)
    _legend(axes[0][0])
    figure.tight_layout()
    for axis, names in named:
        name_points(axis, names, 6)
    _save(plt, figure, file)


def diversity(result: Record, file: Path) -> None:
    """Type-token ratio and distinct-2 of words against decoder passes, with colors for block sizes and markers for
    top-p."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, name, title in zip(
        axes, ("type_token_ratio", "distinct_2"), ("type-token ratio of words", "distinct-2 of words"), strict=True
    ):
        for row in result["points"]:
            kind = family(row["setting"])
            axis.scatter(
                row["decoder_nfe"],
                row[name],
                color=METHODS.get(kind, SERIES[-1]),
                marker=_MARKERS.get(row["top_p"], "x"),
                label=kind,
                s=28,
            )
        axis.set_xlabel(f"decoder passes for {result['length']} bytes")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    _legend(axes[0])
    for top_p, marker in _MARKERS.items():
        axes[1].scatter([], [], color="gray", marker=marker, label=f"top-p {top_p}")
    _legend(axes[1])
    _save(plt, figure, file)


def _legend(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7)


def _pyplot() -> Any:
    import matplotlib

    # Draw to files only, without a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    # No metadata that changes: the same figures give the same file.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
