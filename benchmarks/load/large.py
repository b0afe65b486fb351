"""A large checkpoint served over HTTP on a CPU: start, memory, and bytes a second beside what reading weights allows.

    python -m fastblt.benchmarks.load.large                    the shipped model at the 7B shape: 15 GB on the disk
    python -m fastblt.benchmarks.load.large --weights int8

`start` is the time from the command until the server is ready. Memory is the engine process's own, without pages of
files: the most that it had when the server was ready (`start peak`), what it has then (`stays`), and the most at the
end. For each setting one request is completed, greedily, and its seconds are compared with those that reading the
weights of its passes (`gb` of the answer) takes at the memory's read bandwidth, which is measured before and after all:
the whole request (`read_share`), and what comes after its first byte (`decoding_share`), since a prompt's pass takes as
long as multiplying. The exit status is 1 if an output of a lossless setting differs from BLT's.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.serving import Server, serving
from fastblt.benchmarks.machine import machine_limits, measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.models.vocabulary import decode
from fastblt.models.widen import paper_shape, widen_checkpoint
from fastblt.server.settings import PRETRAINED

_GIB = 2**30


def own_memory(pid: int) -> int:
    """Bytes of a process that are of no file; 0 where there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024


class Watch:
    """Looks at the memory of all processes of a server, ten times a second; `largest` is that of the largest one."""

    def __init__(self) -> None:
        self.largest = self.now = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            self.now = max(map(own_memory, descendants(os.getpid())), default=0)
            self.largest = max(self.largest, self.now)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def descendants(pid: int) -> list[int]:
    children = [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def complete(server: Server, prompt: bytes, setting: str, length: int) -> tuple[dict[str, Any], float]:
    """The answer to a request, and its seconds."""
    how = {name: value for name, value in vars(decoding(setting)).items() if value is not None}
    body = {
        "prompt": prompt.decode(),
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "decoding": how,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read()), time.perf_counter() - began


def measure(
    *,
    model: str = str(PRETRAINED),
    shape: str = "7b",
    weights: str = "auto",
    setting: Sequence[str] = ("blt", "blt-s k16", "blt-dv-8 1step", "blt-dsv-4 k16"),
    input_len: int = 32,
    length: int = 64,
    cache_size: str = "3GiB",
) -> dict[str, Any]:
    """Print and return the figures of the model, widened to `shape` on the disk. `setting` begins with blt."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / shape
        widen_checkpoint(model, folder, paper_shape(shape), torch.bfloat16)
        result = serve(folder, weights, setting, input_len, length, cache_size)
    return measured_with(model) | {"shape": shape, "weights": weights} | result


def serve(
    folder: Path, weights: str, setting: Sequence[str], input_len: int, length: int, cache_size: str
) -> dict[str, Any]:
    """Figures of a server of the checkpoint in `folder`."""
    watch, began = Watch(), time.perf_counter()
    options = ["--weights", weights, "--cache-size", cache_size, "--no-prefix-cache", "--max-running", "8"]
    options += ["--max-model-len", "2048"]
    result: dict[str, Any] = {"settings": {}}
    [ids] = held_out_prompts(1, input_len)
    prompt = decode(ids[1:])
    with serving(str(folder), options) as server:
        result["start_seconds"] = time.perf_counter() - began
        complete(server, prompt, setting[0], 4)
        result["start_peak_gib"], result["stays_gib"] = watch.largest / _GIB, watch.now / _GIB
        early = machine_limits(os.cpu_count() or 1)
        print(
            f"ready after {result['start_seconds']:.0f} s; at most {result['start_peak_gib']:.2f} GiB, "
            f"{result['stays_gib']:.2f} stay\n"
        )
        plain: list[int] = []
        for name in setting:
            first, first_seconds = complete(server, prompt, name, 1)
            answer, seconds = complete(server, prompt, name, length)
            made, gb = answer["choices"][0]["token_ids"], answer["efficiency"]["gb"]
            plain = plain or made
            row = {"bytes_per_second": length / seconds, "seconds": seconds, "gb": gb, "equal": made == plain}
            after = {"gb_after": gb - first["efficiency"]["gb"], "seconds_after": seconds - first_seconds}
            result["settings"][name] = row | after
        late = machine_limits(os.cpu_count() or 1)
        limits = result["limits"] = {name: (value + late[name]) / 2 for name, value in early.items()}
        read = limits["read_gb_s"]
        print(f"memory reads {read:.1f} GB/s\n")
        table = Table("setting", "bytes/s", "seconds", "GB read", "of bandwidth %", "decoding %", "equal to blt")
        for name, row in result["settings"].items():
            row["read_share"] = row["gb"] / read / row["seconds"]
            row["decoding_share"] = row["gb_after"] / read / row["seconds_after"]
            figures = (f"{row['bytes_per_second']:.2f}", f"{row['seconds']:.1f}", f"{row['gb']:.1f}")
            shares = (f"{100 * row[share]:.0f}" for share in ("read_share", "decoding_share"))
            table.row(name, *figures, *shares, "yes" if row["equal"] else "NO")
        result["peak_gib"] = watch.largest / _GIB
    watch.end()
    result["passed"] = all(row["equal"] for row in result["settings"].values())
    print(f"\nat most {result['peak_gib']:.2f} GiB")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
