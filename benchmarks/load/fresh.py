"""`auto` beside fixed settings as a newcomer meets it: short whole requests through HTTP, right after a server's start.

    python -m fastblt.benchmarks.load.fresh    1, 8 and 32 clients, greedy and at 0.8

Every client sends requests, one after another, of 128 to 256 bytes to complete: a lone one 24, each of eight 8, and
each of 32 four. The first ones come when /ready says so. Each setting has a server of its own, started for each round,
so all pay alike for a server's first second. All servers of a round run at the same time and are asked in turns, each
for two requests of every client (of a lone one for one) while the others rest: the machine's speed changes from second
to second. Medians count.
"""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import best_of, over_best, ratio
from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import body
from fastblt.models.vocabulary import decode
from fastblt.server.settings import PRETRAINED

SETTINGS = ("blt", "blt-s k16", "blt-s k32", "blt-dsv-4 k32")


def speeds(
    ports: Mapping[str, int], temperature: float, clients: int, requests: int, together: int
) -> dict[str, float]:
    """Bytes a second of every setting's server at its port, over `requests` requests of every client, a multiple of
    `together`, the requests of every client in a server's turn."""
    prompts = [decode(ids).decode("utf-8", "replace") for ids in held_out_prompts(clients * requests, 256)]
    made, seconds, order = dict.fromkeys(ports, 0), dict.fromkeys(ports, 0.0), list(ports)

    def client(setting: str, numbers: Iterable[int]) -> int:
        return sum(_complete(ports[setting], setting, prompts[at], temperature, at) for at in numbers)

    with ThreadPoolExecutor(clients) as pool:
        for first in range(0, len(prompts), clients * together):
            turn = range(first, first + clients * together)
            numbers = [turn[at::clients] for at in range(clients)]
            for name in order:
                begin = time.perf_counter()
                made[name] += sum(pool.map(client, [name] * clients, numbers))
                seconds[name] += time.perf_counter() - begin
            # Nobody always runs behind the same one.
            order = order[1:] + order[:1]
    return {name: made[name] / seconds[name] for name in ports}


def _complete(port: int, setting: str, prompt: str, temperature: float, number: int) -> int:
    """The bytes of one answer."""
    asked = {
        "prompt": prompt,
        "max_tokens": 128 + number * 37 % 129,
        "temperature": temperature,
        "seed": number,
        "ignore_eos": True,
        "decoding": body(setting),
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


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
            requests, together = (24, 1) if count == 1 else (8 if count < 16 else 4, 2)
            for _ in range(rounds):
                with ExitStack() as stack:
                    ports = {name: stack.enter_context(serving(model, [])).port for name in runs}
                    for name, own in speeds(ports, warmth, count, requests, together).items():
                        runs[name].append(own)
            medians = {name: statistics.median(own) for name, own in runs.items()}
            fixed = {name: runs[name] for name in setting}
            row: dict[str, Any] = {
                "bytes_per_second": medians,
                "rounds": runs,
                "best": best_of(runs["auto"], fixed),
                "over_best": over_best(runs["auto"], fixed),
                "over_blt": ratio(runs["auto"], runs["blt"]),
            }
            result[f"{count} clients, {warmth:g}"] = row
            figures = (f"{medians[name]:.0f}" for name in runs)
            table.row(str(count), f"{warmth:g}", *figures, f"{row['over_best']:.2f}", f"{row['over_blt']:.2f}")
    return result


app = command(fresh)

if __name__ == "__main__":
    app()
