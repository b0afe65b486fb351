"""Tables about the savings of decoding methods."""

from __future__ import annotations

from typing import Any

from fastblt.benchmarks.markdown import number, percent, table
from fastblt.benchmarks.report.facts import Results, kind, method_runs, title
from fastblt.benchmarks.savings.methods import MOST_LOOPS

_HEADLINE = (
    *("blt-s k4", "blt-s k8", "blt-s k16", "blt-s k32"),
    *("blt-dv-4 1step", "blt-dv-8 1step", "blt-dv-16 1step"),
    *("blt-dsv-4 k16", "blt-dsv-4 k32", "blt-dsv-8 k32"),
    *("blt-d-4 a0.7", "blt-d-8 a0.7", "blt-d-16 a0.7"),
)


def saved(results: Results) -> str:
    """Time saved and, in brackets, weights saved. Rows are settings; columns are runs, the shipped model's first."""
    runs = _shipped_first(results)
    columns = [
        _column(part, batch) + (", loops" if run["settings"]["blt"]["loops"] >= MOST_LOOPS else "")
        for part, batch, run in runs
    ]
    rows = []
    for name in _HEADLINE:
        cells = []
        for _, _, run in runs:
            row = run["settings"].get(name)
            cells.append("" if row is None else f"{percent(row['time_saved'])} ({percent(row['weights_saved'])})")
        rows.append([name, *cells])
    return table(("time saved, % (weights saved, %)", *columns), rows)


def _shipped_first(results: Results) -> list[tuple[str, str, dict[str, Any]]]:
    return sorted(method_runs(results), key=lambda run: kind(run[0])[0] is not None)


def _column(part: str, batch: str) -> str:
    """A run in few words: "1B, greedy, 8"."""
    shape, sampled = kind(part)
    return ", ".join([*([shape] if shape else []), "T = 0.8" if sampled else "greedy", batch])


def drafts(results: Results) -> str:
    """Acceptance, bytes a round and passes a byte, at eight requests."""
    parts = []
    for part, batch, run in method_runs(results):
        rows = [
            [
                name,
                percent(row["acceptance"]),
                "" if row["bytes_a_round"] is None else f"{row['bytes_a_round']:.1f}",
                f"{row['decoder_per_byte']:.2f}",
                f"{row['upstream_per_byte']:.2f}",
                percent(row["gb_paper_saved"]),
                percent(row["equal_positions"]),
                percent(row["loops"]),
            ]
            for name, row in run["settings"].items()
            if name in ("blt", *_HEADLINE)
        ]
        columns = (
            *(title(part, batch), "accepted, %", "bytes a round", "decoder passes a byte", "global passes a byte"),
            *("GB saved, % (paper's count)", "bytes equal to `blt`'s, %", "texts that loop, %"),
        )
        parts.append(table(columns, rows))
    return "\n\n".join(parts)


def limits(results: Results) -> str:
    """Bytes a second, and how far they are from what the machine allows."""
    runs = _shipped_first(results)
    names = ["blt", *(name for name in _HEADLINE if any(name in run["settings"] for _, _, run in runs))]
    rows = []
    for name in names:
        found = (run["settings"].get(name) for _, _, run in runs)
        cells = (
            f"{number(row['bytes_per_second'])} ({percent(row['least_seconds'] / row['seconds'])})" if row else ""
            for row in found
        )
        rows.append([name, *cells])
    heads = (_column(part, batch) for part, batch, _ in runs)
    return table(("bytes a second (of the limit, %)", *heads), rows)


def latent(results: Results) -> str:
    """Acceptance of drafts, by the latent that they read."""
    runs = [(part, run) for part, _, run in method_runs(results) if "draft_latent" in run]
    names = [name for name in runs[0][1]["draft_latent"] if name in _HEADLINE]
    rows = []
    for name in names:
        cells = [name]
        for _, run in runs:
            row = run["draft_latent"][name]
            error = f"{100 * row['difference']:+.1f} ± {100 * row['standard_error']:.1f}"
            cells += [percent(row["closed"]), percent(row["forced"]), error]
        rows.append(cells)
    columns = ["accepted, %"]
    for part, _ in runs:
        words = "greedy" if "greedy" in part else "temperature 0.8"
        columns += [f"{words}: closed latent", "the paper's", "difference, points"]
    return table(columns, rows)


def predicted(results: Results) -> str:
    """Predicted over measured time, and the engine's share of the time."""
    [result] = results.values()
    batches = result["batches"]
    last = list(batches)[-1]
    rows = [
        [
            name,
            number(1e6 / row["measured"]),
            f"{row['predicted_over_measured']:.2f}",
            percent(row["engine"] / row["measured"]),
        ]
        for name, row in batches[last].items()
    ]
    together = "one request" if last == "1" else f"{last} requests at once"
    return table((together, "bytes a second", "predicted / measured time", "engine, % of the time"), rows)


def auto(results: Results) -> str:
    """`auto` compared with every fixed setting."""
    [result] = results.values()
    rows = []
    names: list[str] = []
    for key, row in result.items():
        if not key.startswith("batch_"):
            continue
        _, batch, _, temperature = key.split("_")
        names = list(row["bytes_per_second"])
        words = "greedy" if float(temperature) == 0 else f"temperature {temperature}"
        cells = [number(rate) for rate in row["bytes_per_second"].values()]
        over = f"{row['over']['blt']:.2f}", f"{row['over_best']:.2f} ({row['best']})"
        rows.append([f"{batch}, {words}", *cells, *over])
    return table(("requests", *names, "`auto` over `blt`", "over the best lossless"), rows)


def fresh(results: Results) -> str:
    """`auto` compared with fixed settings on servers that have just started."""
    [result] = results.values()
    measured = {name: row for name, row in result.items() if " clients, " in name}
    names = list(next(iter(measured.values()))["bytes_per_second"])
    rows = []
    for name, row in measured.items():
        clients, temperature = name.split(" clients, ")
        words = "greedy" if float(temperature) == 0 else f"temperature {temperature}"
        cells = [number(rate) for rate in row["bytes_per_second"].values()]
        rows.append([f"{clients}, {words}", *cells, f"{row['over_blt']:.2f}", f"{row['over_best']:.2f}"])
    return table(("clients", *names, "`auto` over `blt`", "over the best"), rows)


def quality(results: Results) -> str:
    """What each setting's next lines are worth, and what of BLT's it keeps."""
    [result] = results.values()
    rows = []
    for name, row in result["settings"].items():
        value, low, high = (100 * row["kept"][key] for key in ("value", "low", "high"))
        kept = "100" if low == high == 100 else f"{value:.1f} ({low:.1f} to {high:.1f})"
        passes = f"{row['decoder_nfe_per_byte']:.3f}"
        rows.append([f"`{name}`", f"{100 * row['parses']:.1f}", kept, f"{row['bytes_right']:.2f}", passes])
    columns = ("", "lines that parse, %", "of BLT's, %", "right bytes of a line", "decoder passes a byte")
    return table(columns, rows)


#: Settings of each lossless method, and of BLT-D, and the runs in which they are compared: file, batch, words.
_WINNERS = (
    *("blt-s k8", "blt-s k16", "blt-s k32", "blt-dv-8 1step"),
    *("blt-dsv-4 k32", "blt-dsv-8 k32", "blt-d-8 a0.7"),
)
_PLACES = (
    ("methods-greedy-b1", "1", "shipped model, greedy"),
    ("methods-sampled-b1", "1", "temperature 0.8"),
    ("methods-greedy-b32", "32", "greedy, 32 requests"),
    ("methods-1b-b1", "1", "1B, greedy"),
    ("methods-1b-sampled-b1", "1", "1B, temperature 0.8"),
    ("methods-1b-b8", "8", "1B, greedy, 8 requests"),
)


def winners(results: Results) -> str:
    """Bytes a second over BLT's, by where the time goes: a small model, one whose weights come from memory, a GPU."""
    predicted = results["gpu_prediction"]["predicted"]
    columns = [results[part]["batches"][batch]["settings"] for part, batch, _ in _PLACES]
    speeds = [{name: row["bytes_per_second"] for name, row in settings.items()} for settings in columns]
    on_gpu = {name: predicted.get(f"1b, H200, {name}") for name in ("blt", *_WINNERS)}
    speeds += [{name: rates[requests] for name, rates in on_gpu.items() if rates} for requests in ("1", "32")]
    rows = [["`blt` itself, bytes a second", *(number(own["blt"]) for own in speeds)]]
    for name in _WINNERS:
        rows.append([name, *(f"{own[name] / own['blt']:.2f}" if name in own else "" for own in speeds)])
    places = (*(words for _, _, words in _PLACES), "1B on an H200, predicted", "predicted, 32 requests")
    return table(("bytes a second over `blt`'s", *places), rows)
