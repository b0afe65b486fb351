"""Tables of what is predicted of GPUs."""

from __future__ import annotations

from typing import Any

from fastblt.benchmarks.markdown import number, table
from fastblt.benchmarks.report.facts import Results


def _only(results: Results) -> dict[str, Any]:
    [result] = results.values()
    return result


def kernels(results: Results) -> str:
    """Kernels of a pass, by shape."""
    names = {"scan": "entropy model", "encode": "encoder", "decode": "decoder, choice", "upstream": "upstream"}
    rows = [[shape, *(str(each[name]) for name in names)] for shape, each in _only(results)["kernels"].items()]
    return table(("shape", *names.values()), rows)


def rounds(results: Results) -> str:
    """What the program does for a byte."""
    rows = []
    for name, run in _only(results)["runs"].items():
        made = run["bytes"]
        passes = sum(run["passes"].values())
        cells = [f"{count / made:.2f}" for count in (passes, run["launches"], run["waits"])]
        rows.append([name, *cells, f"{run['copies'] / run['waits']:.2f}"])
    return table(("method, requests", "passes a byte", "launches beside", "waits", "copies a wait"), rows)


def predicted(results: Results) -> str:
    """Bytes a second by shape, chip and number of requests."""
    rows = []
    found = _only(results)["predicted"]
    for name, rates in found.items():
        each = {key: value for key, value in rates.items() if key != "floor"}
        rows.append([name, *(number(rate) for rate in each.values()), number(rates["floor"])])
    batches = [key for key in next(iter(found.values())) if key != "floor"]
    columns = ("shape, chip, method", *(f"{count} requests" for count in batches), "floor by weights, 1 request")
    return table(columns, rows)


def arithmetic(results: Results) -> str:
    """Microseconds of a byte of one request, by its parts."""
    names = ("entropy model", "encoder", "decoder", "upstream", "launches beside", "the host's waits", "in all")
    rows = [
        [
            name,
            *(f"{1e6 * one[part]:.0f}" for part in ("scan", "encode", "decode", "upstream", "beside", "host", "all")),
        ]
        for name, one in _only(results)["arithmetic"].items()
    ]
    return table(("shape, chip, method: microseconds a byte", *names), rows)
