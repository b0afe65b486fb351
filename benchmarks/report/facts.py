"""Headline figures from the results, for both the report and the README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastblt.benchmarks.savings.methods import MOST_LOOPS

Results = Mapping[str, dict[str, Any]]


def method_runs(results: Results) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(part, batch, result) of every run of `bench methods`."""
    for name, result in results.items():
        if name.startswith("methods-"):
            for batch, run in result["batches"].items():
                yield name, batch, run


def lossless(name: str) -> bool:
    """Whether a setting gives the bytes of BLT, with one upstream pass a round."""
    return name.startswith(("blt-s", "blt-dv", "blt-dsv")) and not name.endswith("paper")


def best_lossless(run: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The lossless setting that saves most time, or None.

    Settings whose texts often loop do not count, since repetition inflates the acceptance of drafts.
    """
    rows = {
        name: row
        for name, row in run["settings"].items()
        if lossless(name) and row["loops"] < MOST_LOOPS and run["settings"]["blt"]["loops"] < MOST_LOOPS
    }
    return max(rows.items(), key=lambda item: item[1]["time_saved"], default=None)


def kind(part: str) -> tuple[str | None, bool]:
    """The shape of a part's model (None: as shipped), and whether it sampled: `methods-1b-sampled-b8` -> (1B, True)."""
    first = part.removeprefix("methods-").partition("-")[0]
    return (first.upper() if first[0].isdigit() else None), "-sampled-" in part


def title(part: str, batch: str) -> str:
    """A run in words: `methods-1b-b8` at batch 8 -> "1B weights, greedy, 8 requests at once"."""
    shape, sampled = kind(part)
    words = ("shipped model" if shape is None else f"{shape} weights", "temperature 0.8" if sampled else "greedy")
    return ", ".join((*words, "one request" if batch == "1" else f"{batch} requests at once"))


def headline(results: Results) -> list[tuple[str, str]]:
    """Pairs of (what was measured, figure), for the parts that were run."""
    facts = [*_savings(results), *_http(results), *_traces(results)]
    if peer := results.get("peer-transformers"):
        facts += [
            (
                "Against `transformers` with the same weights, one request",
                f"{peer['over']['blt']:.0f} times the bytes a second with `blt`, "
                f"{max(peer['over'].values()):.0f} times with the best lossless method",
            ),
            (
                f"{peer['together']} requests at once, against its best batch",
                f"{max(peer['together_over'].values()):.0f} times the bytes a second",
            ),
        ]
    return facts


def _savings(results: Results) -> Iterator[tuple[str, str]]:
    for part, batch, run in method_runs(results):
        if found := best_lossless(run):
            name, row = found
            yield (
                f"Time saved against `blt` without changing a byte: {title(part, batch)}",
                f"{100 * row['time_saved']:.0f} % with {setting(name)}",
            )


def _http(results: Results) -> Iterator[tuple[str, str]]:
    sweeps = {name: result for name, result in results.items() if name.startswith("sweep-")}
    if not sweeps:
        return
    name, best = max(sweeps.items(), key=lambda item: item[1]["output_byte_throughput"])
    method, together = name.removeprefix("sweep-").rsplit("-c", 1)
    yield (
        "Most text through HTTP",
        f"{best['output_byte_throughput']:,.0f} bytes a second (`{method}`, {together} clients at once; 99 of 100 get "
        f"their first byte within {best['p99_ttft_ms'] / 1000:.2g} s)",
    )


def _traces(results: Results) -> Iterator[tuple[str, str]]:
    for name, words in (("trace-code", "code completion"), ("trace-conv", "conversation")):
        if trace := results.get(name):
            yield (
                f"{trace['num_prompts']} requests as a production service recorded them ({words}), sent at 90 % of the "
                "rate that this server can answer",
                f"{100 * trace['good_requests'] / trace['num_prompts']:.0f} % are good: {levels(trace)}",
            )


def setting(name: str) -> str:
    """A setting in words: `blt-s k16` -> "`blt-s`, drafts of 16 bytes"."""
    method, _, rest = name.partition(" ")
    if rest.startswith("k"):
        return f"`{method}`, drafts of {rest[1:]} bytes"
    if rest == "1step":
        family, _, size = method.rpartition("-")
        return f"`{family}`, blocks of {size} bytes in one step"
    return f"`{name}`"


def levels(result: dict[str, Any]) -> str:
    """The service levels of a run, in words."""
    words = {"ttft": "to the first byte", "tpob": "a byte", "tpot": "a token", "e2el": "in all"}
    return ", ".join(f"at most {limit:g} ms {words[name]}" for name, limit in result["goodput_ms"].items())
