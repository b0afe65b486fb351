"""What the page at / costs: bytes a second of a loaded server without the page, with it, and with pages open, in turns.

    python -m fastblt.benchmarks.load.page     16 streams, 5 pages open

An open page is one whose view Server is looked at, the dearest: it loads its files, then asks /metrics every two
seconds.
It is asked for as the browser does, but not drawn: a browser would compete for the cores.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.front import stream_all
from fastblt.benchmarks.load.names import Dataset
from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.load.workload import prompts
from fastblt.server.settings import PRETRAINED

#: Seconds between two looks of an open page at the metrics (server/api/page/files/server.js).
EVERY = 2.0


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


@contextmanager
def open_pages(port: int, count: int) -> Iterator[None]:
    """So many pages, open at the view Server."""
    url = f"http://127.0.0.1:{port}/"
    closed = threading.Event()

    def look(delay: float) -> None:
        # They were not opened at the same moment.
        if closed.wait(delay):
            return
        index = _get(url)
        for name in re.findall(r'(?:src|href)="(page/[\w.]+)"', index):
            _get(url + name)
        _get(f"{url}v1/models")
        while not closed.is_set():
            _get(f"{url}metrics")
            closed.wait(EVERY)

    threads = [threading.Thread(target=look, args=(EVERY * at / max(count, 1),)) for at in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        closed.set()
        for thread in threads:
            thread.join()


def measure(
    *, model: str = str(PRETRAINED), streams: int = 16, num_prompts: int = 160, length: int = 128, pages: int = 5,
    rounds: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """Bytes a second without the page, with it closed, and with `pages` open; and their ratios, as medians of turns."""
    asked: dict[str, Any] = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
    more = ["--max-running", str(streams), "--no-prefix-cache"]
    speeds: dict[str, list[float]] = {"without": [], "closed": [], "open": []}
    with serving(model, [*more, "--no-page"]) as without, serving(model, more) as server:
        ports = {"without": (without.port, 0), "closed": (server.port, 0), "open": (server.port, pages)}
        for port, _ in ports.values():
            bodies = [{"prompt": text, **asked} for text, _ in prompts(Dataset.HELD_OUT, streams, 256, 0)]
            stream_all(port, bodies, streams)
        for turn in range(rounds):
            texts = [text for text, _ in prompts(Dataset.HELD_OUT, num_prompts, 256, turn + 1)]
            bodies = [{"prompt": text, **asked} for text in texts]
            # Each comes first, second and third equally often.
            names = list(ports)
            for name in names[turn % 3 :] + names[: turn % 3]:
                port, count = ports[name]
                with open_pages(port, count):
                    seconds, tokens = stream_all(port, bodies, streams)
                speeds[name].append(sum(tokens) / seconds)
            time.sleep(0.1)
    median = {name: statistics.median(values) for name, values in speeds.items()}

    def loss(one: str, other: str) -> float:
        return statistics.median(1 - a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    result: dict[str, Any] = {"pages": pages, "streams": streams, "bytes_per_second": median, "turns": speeds}
    result |= {"loss_closed": loss("closed", "without"), "loss_open": loss("open", "closed")}
    for name, value in median.items():
        print(f"{name}: {value:.0f} bytes/s", flush=True)
    print(f"the page costs {100 * result['loss_closed']:.1f} %, {pages} open {100 * result['loss_open']:.1f} %")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
