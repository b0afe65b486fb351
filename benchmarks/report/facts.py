"""What the results say in numbers: the one source of the report's headline and of the README's table."""

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
    """Whether a setting gives the bytes of BLT, at one upstream pass a round."""
    return name.startswith(("blt-s", "blt-dv")) and not name.endswith("paper")


def best_lossless(run: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The lossless setting that saves most time, where few texts loop: repetition flatters every draft. Else None."""
    rows = {
        name: row
        for name, row in run["settings"].items()
        if lossless(name) and row["loops"] < MOST_LOOPS and run["settings"]["blt"]["loops"] < MOST_LOOPS
    }
    return max(rows.items(), key=lambda item: item[1]["time_saved"], default=None)


def title(part: str, batch: str) -> str:
    """`methods-1b-b8` at batch 8: what was run, in words."""
    kind = part.removeprefix("methods-").rsplit("-b", 1)[0]
    words = {"greedy": "shipped model, greedy", "sampled": "shipped model, temperature 0.8"}
    return f"{words.get(kind, f'{kind.upper()} shape, greedy')}, batch {batch}"


def headline(results: Results) -> list[tuple[str, str]]:
    """Pairs of what was measured and the figure, of those parts that were run."""
    facts: list[tuple[str, str]] = []
    for part, batch, run in method_runs(results):
        if found := best_lossless(run):
            name, row = found
            facts.append(
                (
                    f"Time saved by the best lossless setting: {title(part, batch)}",
                    f"{100 * row['time_saved']:.0f} % ({name}; weights saved {100 * row['weights_saved']:.0f} %)",
                )
            )
    sweeps = {name: result for name, result in results.items() if name.startswith("sweep-")}
    if sweeps:
        name, best = max(sweeps.items(), key=lambda item: item[1]["output_byte_throughput"])
        method, together = name.removeprefix("sweep-").rsplit("-c", 1)
        facts.append(
            (
                "Most bytes a second through HTTP",
                f"{best['output_byte_throughput']:.0f} ({method}, {together} streams, "
                f"{best['p99_ttft_ms']:.0f} ms to the first byte at p99)",
            )
        )
    for name, words in (("trace-code", "code"), ("trace-conv", "conversation")):
        if trace := results.get(name):
            share = trace["good_requests"] / trace["num_prompts"]
            facts.append(
                (
                    f"Azure {words} trace, {trace['num_prompts']} requests near saturation",
                    f"{trace['request_goodput']:.2f} good requests/s of {trace['request_throughput']:.2f} "
                    f"({100 * share:.0f} % within {levels(trace)})",
                )
            )
    if peer := results.get("peer-transformers"):
        facts.append(
            (
                "Against `transformers` on the same weights, one request",
                f"{peer['over']['blt']:.0f} times the bytes a second with `blt`, "
                f"{max(peer['over'].values()):.0f} with the best lossless method",
            )
        )
        facts.append(
            (
                f"{peer['together']} requests at once, against its best batch",
                f"{max(peer['together_over'].values()):.0f} times the bytes a second",
            )
        )
    return facts


def levels(result: dict[str, Any]) -> str:
    """The service levels of a run, in words."""
    words = {"ttft": "to the first byte", "tpob": "a byte", "tpot": "a token", "e2el": "in all"}
    return ", ".join(f"{limit:g} ms {words[name]}" for name, limit in result["goodput_ms"].items())
