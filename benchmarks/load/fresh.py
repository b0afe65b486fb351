"""`auto` beside fixed settings as a newcomer meets it: short whole requests through HTTP, right after a server's start.

    python -m fastblt.benchmarks.load.fresh    1, 8 and 32 clients, greedy and at 0.8

Every client sends requests, one after another, of 128 to 256 bytes to complete: eight, a lone one 24, and of many each
four. The first ones come when /ready says so. Each setting has a server of its own, started for each round, so all pay
alike for a server's first second. Medians count.
"""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import ratio
from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import body
from fastblt.models.vocabulary import decode
from fastblt.server.settings import PRETRAINED

SETTINGS = ("blt", "blt-s k16", "blt-s k32", "blt-dsv-4 k32", "blt-dsv-8 k32")


def speed(port: int, setting: str, temperature: float, clients: int, each: int) -> float:
    """Bytes a second of `each` requests of every client, from the first to the last answer."""
    prompts = [decode(ids).decode("utf-8", "replace") for ids in held_out_prompts(clients * each, 256)]

    def client(number: int) -> int:
        made = 0
        for at in range(number, len(prompts), clients):
            asked = {
                "prompt": prompts[at],
                "max_tokens": 128 + at * 37 % 129,
                "temperature": temperature,
                "seed": at,
                "ignore_eos": True,
                "decoding": body(setting),
            }
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                made += json.load(answer)["usage"]["completion_tokens"]
        return made

    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        made = sum(pool.map(client, range(clients)))
        return made / (time.perf_counter() - begin)


def fresh(
    *,
    model: str = str(PRETRAINED),
    rounds: int = 5,
    clients: Sequence[int] = (1, 8, 32),
    temperature: Sequence[float] = (0.0, 0.8),
    setting: Sequence[str] = SETTINGS,
) -> dict[str, Any]:
    """Bytes a second of `auto` and of the fixed settings; `auto` over the best of these, and over BLT."""
    table = Table("clients", "temperature", "auto", *setting, "auto over the best", "over BLT")
    result: dict[str, Any] = {}
    for count in clients:
        for warmth in temperature:
            runs: dict[str, list[float]] = {name: [] for name in ("auto", *setting)}
            for _ in range(rounds):
                for name, own in runs.items():
                    with serving(model, []) as server:
                        own.append(
                            speed(server.port, name, warmth, count, 24 if count == 1 else 8 if count < 16 else 4)
                        )
            speeds = {name: statistics.median(own) for name, own in runs.items()}
            # Ratios are of the same turn, since the machine's speed changes between turns.
            best = min(setting, key=lambda name: ratio(runs["auto"], runs[name]))
            row = {
                "bytes_per_second": speeds,
                "best": best,
                "over_best": ratio(runs["auto"], runs[best]),
                "over_blt": ratio(runs["auto"], runs["blt"]),
            }
            result[f"{count} clients, {warmth:g}"] = row
            figures = (f"{speeds[name]:.0f}" for name in runs)
            table.row(str(count), f"{warmth:g}", *figures, f"{row['over_best']:.2f}", f"{row['over_blt']:.2f}")
    return result


app = command(fresh)

if __name__ == "__main__":
    app()
