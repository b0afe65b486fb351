"""`auto` beside fixed settings as a newcomer meets it: short whole requests through HTTP, right after a server's start.

    python -m fastblt.benchmarks.load.fresh    1, 8 and 32 clients, greedy and at 0.8, each setting on a fresh server

Every client sends one request after another, of 128 to 256 bytes to complete; the first ones come when /ready says so.
Settings take turns, and medians count.
"""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import in_turns
from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import body
from fastblt.models.vocabulary import decode
from fastblt.server.settings import PRETRAINED

SETTINGS = ("auto", "blt", "blt-s k8", "blt-s k16", "blt-s k32", "blt-dv-8 1step", "blt-dsv-8 k32")


def speed(model: str, setting: str, temperature: float, clients: int, each: int, seed: int) -> float:
    """Bytes a second of `each` requests of every client on a fresh server, from the first to the last answer."""
    prompts = [decode(ids).decode("utf-8", "replace") for ids in held_out_prompts(clients * each, 256, seed)]

    def client(port: int, number: int) -> int:
        made = 0
        for at in range(number, len(prompts), clients):
            asked = {
                "prompt": prompts[at],
                "max_tokens": 128 + (at * 37 + seed) % 129,
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

    with serving(model, []) as server, ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        made = sum(pool.map(partial(client, server.port), range(clients)))
        return made / (time.perf_counter() - begin)


def fresh(
    *,
    model: str = str(PRETRAINED),
    rounds: int = 3,
    clients: Sequence[int] = (1, 8, 32),
    temperature: Sequence[float] = (0.0, 0.8),
    setting: Sequence[str] = SETTINGS,
) -> dict[str, Any]:
    """Bytes a second by setting; `auto` over the best fixed setting, and over BLT."""
    table = Table("clients", "temperature", *setting, "auto over the best", "over BLT")
    result: dict[str, Any] = {}
    for count in clients:
        for warmth in temperature:
            each = 8 if count == 1 else 3 if count < 16 else 2
            calls = {name: partial(speed, model, name, warmth, count, each, 0) for name in setting}
            runs = in_turns(rounds, calls)
            speeds = {name: statistics.median(own) for name, own in runs.items()}
            row: dict[str, Any] = {"bytes_per_second": speeds}
            over = [""] * 2
            if "auto" in speeds and len(speeds) > 1:
                # Of the same turn each, since the machine's speed changes between turns.
                best = [max(own[turn] for name, own in runs.items() if name != "auto") for turn in range(rounds)]
                row["over_best"] = statistics.median(a / b for a, b in zip(runs["auto"], best, strict=True))
                over[0] = f"{row['over_best']:.2f}"
                if "blt" in speeds:
                    row["over_blt"] = statistics.median(a / b for a, b in zip(runs["auto"], runs["blt"], strict=True))
                    over[1] = f"{row['over_blt']:.2f}"
            result[f"{count} clients, {warmth:g}"] = row
            table.row(str(count), f"{warmth:g}", *(f"{speeds[name]:.0f}" for name in setting), *over)
    return result


app = command(fresh)

if __name__ == "__main__":
    app()
