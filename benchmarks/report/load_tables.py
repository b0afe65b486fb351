"""Tables about servers under load."""

from __future__ import annotations

from statistics import median
from typing import Any

from fastblt.benchmarks.markdown import number, percent, table
from fastblt.benchmarks.report.facts import Results, levels

_PLANNED = 0.7
_COMPLETION = 256


def _sweeps(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of the sweeps by method and number of streams."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, result in results.items():
        method, together = name.removeprefix("sweep-").rsplit("-c", 1)
        found.setdefault(method, {})[int(together)] = result
    return found


def streams(results: Results) -> str:
    """Bytes a second and time to the first byte, by method and number of clients."""
    sweeps = _sweeps(results)
    numbers = sorted(next(iter(sweeps.values())))
    rows = []
    for method, points in sweeps.items():
        rows.append([f"`{method}`: bytes a second", *(number(points[n]["output_byte_throughput"]) for n in numbers)])
        rows.append(["first byte, ms, p99", *(number(points[n]["p99_ttft_ms"]) for n in numbers)])
        rows.append(["ms a byte, median", *(f"{points[n]['median_tpob_ms']:.1f}" for n in numbers)])
    return table(("clients at once", *map(str, numbers)), rows)


def capacity(results: Results) -> str:
    """Capacity planning: one server's best rate, for numbers of machines."""
    points = _sweeps(results)["auto"]
    together, best = max(points.items(), key=lambda item: item[1]["output_byte_throughput"])
    rate = best["output_byte_throughput"]
    prompt = best["total_input_bytes"] // best["completed"]
    rows = []
    for machines in (1, 10, 100):
        planned = machines * _PLANNED * rate
        cells = [number(machines * rate), number(planned), number(planned / _COMPLETION), number(machines * together)]
        rows.append([str(machines), *cells])
    columns = ("machines", "bytes a second", f"planned at {_PLANNED}", f"completions of {_COMPLETION} bytes a second")
    text = (
        f"At {together} clients a server gives {number(rate)} bytes a second on {best['machine']['cores']} cores. A "
        f"prompt of {prompt} bytes that comes to an idle server has its first byte after "
        f"{points[1]['median_ttft_ms']:.0f} ms (median)."
    )
    return f"{text}\n\n{table((*columns, 'running at once'), rows)}"


def traces(results: Results) -> str:
    """Replays of recorded traffic near the server's highest rate."""
    rows = []
    for name, words in (("code", "code completion"), ("conv", "conversation")):
        if (trace := results.get(f"trace-{name}")) is None:
            continue
        rows.append(
            [
                words,
                f"{results[f'trace-{name}-saturation']['request_throughput']:.1f}",
                f"{trace['request_throughput']:.1f}",
                number(trace["output_byte_throughput"]),
                f"{percent(trace['good_requests'] / trace['num_prompts'])} %",
                number(trace["p50_ttft_ms"]),
                number(trace["p99_ttft_ms"]),
                str(trace["failed"]),
            ]
        )
    columns = (
        *("trace", "requests a second, all sent at once", "in the replay", "bytes a second", "good requests"),
        *("first byte, ms, p50", "p99", "failed"),
    )
    good = levels(next(result for name, result in results.items() if name.startswith("trace-")))
    return f"{table(columns, rows)}\n\nGood is: {good}."


def peers(results: Results) -> str:
    """Comparison with `transformers` on the same weights, and other servers' speed with random weights."""
    parts = []
    if peer := results.get("peer-transformers"):
        rows = [["`transformers`", f"{peer['output_byte_throughput']:.1f}", f"{max(peer['batches'].values()):.1f}"]]
        for name, rate in peer["ours"].items():
            together = peer["ours_together"].get(name)
            cells = [f"{number(rate)} ({peer['over'][name]:.0f} times)"]
            cells.append("" if together is None else f"{number(together)} ({peer['together_over'][name]:.0f} times)")
            rows.append([f"`{name}`", *cells])
        together = f"{peer['together']} requests (theirs: its best batch)"
        parts.append(table(("bytes a second", "one request", together), rows))
    rows = [
        [
            f"`{peer['server']}`, {peer['weights'] / 1e6:.1f} million random weights",
            str(peer["max_concurrency"]),
            number(peer["output_byte_throughput"]),
            str(peer["failed"]),
        ]
        for name, peer in results.items()
        if "bytes_per_token" in peer
    ]
    if rows:
        parts.append(table(("server of a token-level model", "clients", "bytes a second of its text", "failed"), rows))
    return "\n\n".join(parts)


def token_loop(results: Results) -> str:
    """llama.cpp's own loop over a token-level model, without a server."""
    [result] = results.values()
    rows = []
    for count, row in result["requests"].items():
        rates, read = row["bytes_per_second"], row["weights_read"]
        rows.append(
            [
                count,
                number(rates["theirs"]),
                *(f"{number(rates[name])} ({row['over'][name]:.2f} times)" for name in row["over"]),
                *(f"{read[name] / 1e6:.1f}" for name in ("theirs", *row["over"])),
            ]
        )
    columns = (
        *("requests", "llama.cpp, bytes a second", "`blt`", "`auto`"),
        *("million weights read a byte, llama.cpp", "`blt`", "`auto`"),
    )
    return table(columns, rows)


def fairness(results: Results) -> str:
    """What a short request a second feels beside long prompts and long outputs, and what sharing work saves."""
    rows = []
    for name, result in results.items():
        kind, _, count = name.removeprefix("fairness-").partition("-")
        if kind == "shared":
            continue
        words = f"{count} prompts of 30,000 bytes" if kind == "prompts" else "64 outputs of 2,000 bytes"
        milliseconds = (result[key] for key in ("first_byte_p50_s", "first_byte_p95_s", "gap_p99_s"))
        rate = result["prompt_bytes_per_second" if kind == "prompts" else "bytes_per_second"]
        rows.append([words, *(number(round(1000 * value)) for value in milliseconds), number(rate)])
    columns = (
        *("beside", "first byte of a short request, ms, p50", "p95", "gaps of a stream, ms, p99"),
        "bytes a second of the long ones",
    )
    shared = results["fairness-shared"]
    text = (
        f"Sixteen choices of one prompt of 20,000 bytes take {shared['n_over_one']:.2f} times as long to their first "
        "bytes as one; eight requests with the same first 8,000 bytes "
        f"{shared['at_once_over_one_after_another']:.2f} times as long at once as one after another."
    )
    return f"{table(columns, rows)}\n\n{text}"


def starvation(results: Results) -> str:
    """The longest wait of a simulated hour."""
    [result] = results.values()
    rows = [
        ["requests", number(result["requests"])],
        *(
            [f"first byte, s, {words}", f"{result[f'first_byte_{key}_s']:.2f}"]
            for key, words in (("p50", "median"), ("p99", "p99"), ("max", "longest"))
        ),
        ["longest wait, over its bound", f"{result['longest_wait_over_bound']:.2f}"],
    ]
    return table((f"random arrivals at {percent(result['load'])} % load, simulated", ""), rows)


def front(results: Results) -> str:
    """Bytes a second through HTTP, and of the engine alone."""
    [result] = results.values()
    rows = []
    for run in result["runs"]:
        served, alone = median(run["served"]), median(run["alone"])
        rows.append([f"`{run['method']}`", number(served), number(alone), percent(1 - served / alone, 1)])
    streams_at_once = result["runs"][0]["streams"]
    columns = (f"{streams_at_once} clients, bytes a second", "through HTTP", "engine alone", "HTTP takes, %")
    return table(columns, rows)


def first_picture(results: Results) -> str:
    """What a newcomer waits for."""
    [result] = results.values()
    rows = [
        [f"{name} start", *(f"{result[name][key]:.1f}" for key in ("answers_s", "first_byte_s", "whole_s"))]
        for name in ("first", "later")
    ]
    return table(("seconds until", "the server answers", "the first byte is on the page", "256 bytes are"), rows)


def page(results: Results) -> str:
    """Bytes a second without the page at /, with it, and with pages open."""
    [result] = results.values()
    speed, losses = result["bytes_per_second"], {"closed": "loss_closed", "open": "loss_open"}
    names = {"without": "`--no-page`", "closed": "served, not open", "open": f"{result['pages']} open"}
    rows = [
        [names[name], number(value), percent(result[losses[name]], 1) if name in losses else ""]
        for name, value in speed.items()
    ]
    return table((f"{result['streams']} clients, `auto`", "bytes a second", "less than the line above, median %"), rows)


def soak(results: Results) -> str:
    """Ten minutes of overload."""
    [result] = results.values()
    rows = [
        ["minutes", f"{result['seconds'] / 60:.0f}"],
        ["requests that the engine ended, once each", number(sum(result["ended"].values()))],
        ["answers of 429 that clients got, and the metric", " / ".join(number(n) for n in result["429s"].values())],
        ["answers of 5xx", str(sum(n for status, n in result["statuses"].items() if status.startswith("5")))],
        ["bytes a second in the last fifth, over the first", f"{result['bytes_per_second']['ratio']:.2f}"],
    ]
    for name, words in (("server_memory", "HTTP process"), ("engine_memory", "engine process")):
        memory = result["memory"][name]
        rows.append([f"MiB of the {words}, half way and at the end", _pair(memory["middle_mib"], memory["last_mib"])])
    return table(("overload, too little cache on purpose", ""), rows)


def _pair(first: float, second: float) -> str:
    return f"{first:.1f} / {second:.1f}"
