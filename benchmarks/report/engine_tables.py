"""Tables about the engine without a server, and about its guarantees."""

from __future__ import annotations

from typing import Any

from fastblt.benchmarks.markdown import number, percent, table
from fastblt.benchmarks.report.facts import Results


def _only(results: Results) -> dict[str, Any]:
    [result] = results.values()
    return result


def overhead(results: Results) -> str:
    """The engine's speed and that of a bare decoding loop."""
    rows = [
        [
            key.removeprefix("batch_"),
            number(row["engine_bytes_per_second"]),
            number(row["bare_bytes_per_second"]),
            f"{row['engine_over_bare']:.1f}",
        ]
        for key, row in _only(results).items()
        if key.startswith("batch_") and isinstance(row, dict)
    ]
    return table(("requests", "engine, bytes a second", "bare loop", "times"), rows)


def host_time(results: Results) -> str:
    """Processor time of the host's Python per decoder pass."""
    rows = [
        [
            name,
            f"{run['passes_per_step']:.1f}",
            f"{run['beside']['mean']:.0f}",
            f"{run['alone']['mean']:.0f}",
            f"{min(run['rounds']):.0f} to {max(run['rounds']):.0f}",
            f"{run['target_us']:.0f}",
        ]
        for name, run in _only(results)["runs"].items()
    ]
    columns = ("method, requests", "passes a call", "beside the passes, us", "alone, us", "alone, all rounds", "bound")
    return table(columns, rows)


def holding(results: Results) -> str:
    """Weights read, and bytes a second, by the most decoder passes in a beat."""
    rows = [
        [
            *name.removesuffix(" passes a beat").rsplit(", ", 1),
            f"{run['decoder_passes_per_byte']:.3f}",
            f"{run['global_passes_per_byte']:.4f}",
            f"{run['weights_read']:.2f}",
            number(run["weights_read_1b"]),
            number(run["bytes_per_second"]),
        ]
        for name, run in _only(results)["runs"].items()
    ]
    columns = (
        *("method", "passes a beat, at most", "decoder passes a byte", "global passes a byte"),
        *("million weights read a byte", "the same at 1B", "bytes a second"),
    )
    return table(columns, rows)


def hold_time(results: Results) -> str:
    """Effects of `--max-hold-ms` at the 1B shape."""
    rows = [
        [
            run["method"],
            str(run["requests"]),
            "none" if run["max_hold_ms"] is None else f"{run['max_hold_ms']:.0f}",
            f"{run['bytes_per_second']:.1f}",
            f"{run['global_passes_per_byte']:.4f}",
            f"{run['p50_gap_ms'] / 1000:.1f}",
            f"{run['p99_gap_ms'] / 1000:.1f}",
            f"{_in_all(run):.0f}",
        ]
        for run in _only(results)["runs"]
    ]
    columns = (
        *("method", "requests", "hold, ms", "bytes a second", "global passes a byte", "gap p50, s", "gap p99, s"),
        "whole request p99, s",
    )
    return table(columns, rows)


def _in_all(run: dict[str, Any]) -> float:
    [milliseconds] = [value for key, value in run.items() if key.startswith("p99_") and "gap" not in key]
    return float(milliseconds) / 1000


def lossless(results: Results) -> str:
    """How many outputs differ from BLT's."""
    rows = []
    for kind in ("greedy", "sampled"):
        runs = _only(results)[kind]
        outputs, different = (
            sum(run["outputs"] for run in runs.values()),
            sum(len(r["differences"]) for r in runs.values()),
        )
        rows.append(
            [kind, str(len(runs)), number(outputs), number(sum(r["bytes"] for r in runs.values())), str(different)]
        )
    return table(("", "settings", "outputs", "bytes", "outputs that differ from `blt`'s"), rows)


def default_mode(results: Results) -> str:
    """How often a batch changes bytes without `--deterministic`."""
    result = _only(results)
    return table(
        ("requests, in batches and alone", "that differ"), [[str(result["requests"]), str(result["differing"])]]
    )


def schemas(results: Results) -> str:
    """JSON by schema, in every lossless method."""
    result = _only(results)
    rows = []
    for name, greedy in result["greedy"].items():
        runs = (greedy, result["sampled"][name])
        rows.append(
            [
                name,
                str(sum(run["outputs"] for run in runs)),
                str(sum(run["valid"] for run in runs)),
                str(sum(run["equal"] for run in runs)),
                " / ".join(filter(None, (_accepted(run["ledger"]) for run in runs))),
            ]
        )
    columns = ("method", "outputs", "valid", "equal to `blt`'s", "accepted of drafts, %: greedy / temperature 1")
    return table(columns, rows)


def _accepted(ledger: dict[str, Any]) -> str:
    return percent(ledger["accepted"] / ledger["drafted"], 1) if ledger["drafted"] else ""


def utf8(results: Results) -> str:
    """Strict UTF-8."""
    rows = [
        [name, str(run["outputs"]), str(run["decoded"]), str(run["beyond_ascii"]), str(run["decoded_free"])]
        for name, run in _only(results)["utf8"].items()
    ]
    return table(("method", "outputs", "that decode", "beyond ASCII", "that decode without `strict`"), rows)


def constraint_cost(results: Results) -> str:
    """Bytes a processor second with constraints, relative to those without."""
    rows = [
        [name, f"{run['strict UTF-8']:.2f}", f"{run['grammar']:.2f}" if "grammar" in run else "refused"]
        for name, run in _only(results)["cost"].items()
    ]
    return table(("method", "strict UTF-8", "a grammar that any text satisfies"), rows)
