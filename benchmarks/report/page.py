"""The report: a self-contained HTML page, made from the results' JSON files."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastblt.benchmarks.report.charts import draw_all
from fastblt.benchmarks.report.facts import Results, headline, levels, method_runs, title
from fastblt.benchmarks.report.parts import load_results
from fastblt.benchmarks.savings.methods import MOST_LOOPS

_CAPTIONS = {
    "throughput.png": "Closed loops of 1 to 128 streams through HTTP.",
    "savings.png": "What each setting saves of plain BLT. The gap between the bars is taken apart in the tables below.",
    "predicted.png": "Predicted: the sum over passes of what a pass of so many rows costs on this machine.",
    "acceptance.png": "How far into a draft the model agrees.",
    "roofline.png": "A pass by its rows. Dashed: all weights read once, or all products at the full rate.",
}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --accent: #2f5d8a; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.quiet { color: var(--quiet); } figure { margin: 1rem 0; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { color: var(--quiet); } code, pre { font-size: 13px; } pre { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .wide { overflow-x: auto; }
dl { display: grid; grid-template-columns: minmax(16rem, 2fr) 3fr; gap: .4rem 1.2rem; }
dt { color: var(--quiet); } dd { margin: 0; font-weight: 600; } tr.loops td { color: var(--quiet); }
"""


def write_report(folder: Path) -> Path:
    """Draw the charts and write `report.html` into the folder of the results. Raises ValueError without results."""
    # Files without `part` were made by other commands.
    results = {name: result for name, result in load_results(folder).items() if "part" in result}
    if not results:
        raise ValueError(f"{folder} has no results; run `fastblt bench all` first")
    charts = draw_all(results, folder)
    path = folder / "report.html"
    path.write_text(page(results, {name: (folder / name).read_bytes() for name in charts}), encoding="utf-8")
    return path


def page(results: Results, charts: dict[str, bytes]) -> str:
    """The whole page."""
    parts = ["<h1>FastBLT, measured</h1>", _ran_on(results), "<h2>In short</h2>", _facts(headline(results))]
    for name, image in charts.items():
        data = base64.b64encode(image).decode()
        caption = html.escape(_CAPTIONS[name])
        image_tag = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image_tag}<figcaption>{caption}</figcaption></figure>")
    parts += [_methods(results), _loads(results), _peers(results), _commands(results)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>FastBLT, measured</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _ran_on(results: Results) -> str:
    """The machines, versions and checkpoints of all parts; a line for each that differs."""
    lines = []
    for result in results.values():
        machine, versions = result["machine"], result["versions"]
        accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
        line = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{accelerator}; "
            + f"{machine['system']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"; checkpoint {result['part']['model']} ({result['part']['checkpoint']})"
        )
        if line not in lines:
            lines.append(line)
    dates = sorted(result["date"][:8] for result in results.values())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return "".join(f'<p class="quiet">{html.escape(line)}</p>' for line in [*lines, f"Measured {when}."])


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    note = (
        f"Savings are headlines only where fewer than {100 * MOST_LOOPS:.0f} % of the texts end in a loop: repetition "
        "flatters every draft."
    )
    return f'<dl>{rows}</dl><p class="quiet">{note}</p>'


def _methods(results: Results) -> str:
    blocks: list[str] = []
    columns = (
        "setting", "accepted %", "decoder/byte", "global/byte", "bytes/patch", "GB, paper's %", "weights %",
        "predicted %", "time %", "row curve", "attention", "engine", "predicted / measured", "equal %", "loops %",
        "distinct-4", "bytes/s",
    )  # fmt: skip
    for part, batch, run in method_runs(results):
        rows = []
        for name, row in run["settings"].items():
            gap = row["gap"]
            cells = [
                name,
                _percent(row["acceptance"]),
                f"{row['decoder_per_byte']:.3f}",
                f"{row['upstream_per_byte']:.3f}",
                "" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}",
                *(_percent(row[key]) for key in ("gb_paper_saved", "weights_saved", "predicted_saved", "time_saved")),
                *(_percent(gap[key]) for key in ("row_curve", "attention_and_cache", "engine")),
                f"{row['predicted_over_measured']:.2f}",
                _percent(row["equal_positions"]),
                _percent(row["loops"]),
                f"{row['distinct4']:.2f}",
                f"{row['bytes_per_second']:.1f}",
            ]
            rows.append((cells, "loops" if row["loops"] >= MOST_LOOPS else ""))
        opened = " open" if not blocks else ""
        blocks.append(
            f"<details{opened}><summary>{html.escape(title(part, batch))}</summary>{_table(columns, rows)}</details>"
        )
    if not blocks:
        return ""
    text = (
        "Saved against plain BLT. The paper's GB are of each request alone, weights what the batch's passes read. "
        "Row curve, attention (with cache) and engine are the points between weights saved and time saved. Gray rows "
        "loop. “paper” pays the paper's two upstream passes a round."
    )
    return f'<h2>Methods</h2><p class="quiet">{text}</p>' + "\n".join(blocks)


def _loads(results: Results) -> str:
    columns = (
        "load", "requests", "failed", "requests/s", "good/s", "bytes/s", "first byte p50", "p99", "ms a byte p50",
        "p99", "in all p99",
    )  # fmt: skip
    rows, notes = [], []
    for name, result in results.items():
        if not name.startswith(("sweep-", "trace-", "peer-llama", "peer-transformers-serve")):
            continue
        good = result["request_goodput"]
        cells = [
            name,
            str(result["num_prompts"]),
            str(result["failed"]),
            f"{result['request_throughput']:.2f}",
            "" if good is None else f"{good:.2f}",
            f"{result['output_byte_throughput']:.0f}",
            *(f"{result.get(key, float('nan')):.0f}" for key in ("p50_ttft_ms", "p99_ttft_ms")),
            *(f"{result.get(key, float('nan')):.2f}" for key in ("p50_tpob_ms", "p99_tpob_ms")),
            f"{result.get('p99_e2el_ms', float('nan')):.0f}",
        ]
        rows.append((cells, ""))
        if name.startswith("trace-"):
            factors = ", ".join(f"{key} {value:.4g}" for key, value in result["trace_factors"].items())
            notes.append(f"{name}: good is {levels(result)}; scaled by {factors}.")
    if not rows:
        return ""
    lines = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in notes)
    credit = (
        '<p class="quiet">Traces: Azure LLM inference trace 2023 (CC-BY 4.0), Patel et al., “Splitwise”, ISCA 2024.</p>'
        if notes
        else ""
    )
    return "<h2>Load</h2>" + _table(columns, sorted(rows, key=lambda row: _natural(row[0][0]))) + lines + credit


def _peers(results: Results) -> str:
    texts = []
    if peer := results.get("peer-transformers"):
        ours = ", ".join(f"{name} {value:.0f}" for name, value in peer["ours"].items())
        texts.append(
            f"{peer['peer']}: {peer['output_byte_throughput']:.2f} bytes/s; this engine on the same prompts, one at a "
            f"time: {ours} bytes/s. Of {peer['num_prompts'] * peer['output_len']} greedy bytes {peer['equal_bytes']} "
            "are equal."
        )
        batches = ", ".join(f"{rate:.1f} in batches of {size}" for size, rate in peer["batches"].items())
        together = ", ".join(f"{name} {value:.0f}" for name, value in peer["ours_together"].items())
        texts.append(f"It made {batches}; this engine with {peer['together']} requests at once: {together} bytes/s.")
    for name, peer in results.items():
        if name.startswith("peer-") and "bytes_per_token" in peer:
            text = f"{peer['output_byte_throughput']:.0f} bytes/s of its random text"
            if peer.get("usage_reported"):
                rate = peer["output_throughput"]
                text += (
                    f"; {rate:.0f} tokens/s, which at {peer['bytes_per_token']:.2f} bytes per token of held-out code "
                    f"are {rate * peer['bytes_per_token']:.0f} bytes/s"
                )
            texts.append(
                f"{name}: {peer['server']}, a random Llama of {peer['weights'] / 1e6:.1f} million fp32 weights: {text}."
            )
    if not texts:
        return ""
    texts.append(
        "Not compared: quality, for the token-level model is random; and other servers of BLT, for there is none with "
        "a whole cache."
    )
    return "<h2>Peers</h2>" + "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _commands(results: Results) -> str:
    lines = [f"{name}: python -m {' '.join(result['part']['command'])}" for name, result in results.items()]
    servers = sorted({result["server_command"] for result in results.values() if "server_command" in result})
    text = html.escape("\n".join([*lines, "", *(f"server: {one}" for one in servers)]))
    return (
        "<h2>How</h2><p>All of it: <code>fastblt bench all --traces FOLDER</code>, in parts that are resumed. Each "
        f"alone:</p><pre>{text}</pre>"
    )


def _table(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, kind in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _natural(name: str) -> tuple[str, int]:
    """A sort key that puts c2 before c16."""
    stem, _, number = name.rpartition("-c")
    return (stem, int(number)) if number.isdecimal() else (name, 0)
