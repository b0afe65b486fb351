"""The parts of the full run. Each is a command that writes a JSON file.

A part is done if its file exists and was made by the same command on the same checkpoint. So an interrupted run
continues where it stopped, and a new checkpoint needs all parts again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastblt.benchmarks.report.scripts import SCRIPTS, Script

#: Traces are replayed at this share of the server's highest rate.
NEAR_SATURATION = 0.9
#: Service levels of good requests, in milliseconds.
LEVELS = ("ttft:1000", "tpob:50")
_TRACES = {
    # The recorded service has models a hundred times as large, and prompts too long for ours: sizes are scaled down.
    "code": ("AzureLLMInferenceTrace_code.csv", "0.05", "1"),
    "conv": ("AzureLLMInferenceTrace_conv.csv", "0.1", "0.25"),
}

Earlier = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One part of the full run.

    `command` gives the arguments of `python -m`, from the results of earlier parts and, if the part has a `server`, its
    address. `server` is a kind of server (`fastblt`, `llama.cpp`, `transformers`) and its options. `needs` are packages
    without which the part is left out. With several `rounds`, the result with the median of output bytes a second is
    kept, and parts with the same server take turns.
    """

    name: str
    command: Callable[[Earlier, str], list[str]]
    server: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    large: bool = False
    rounds: int = 1


@dataclass
class Plan:
    """A full run: the checkpoint, the folder of traces (None: no replays), and whether to use the smallest sizes."""

    model: str
    traces: Path | None
    quick: bool = False
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        scripts = [self._script(name, script) for name, script in SCRIPTS.items()]
        self.parts = [*self._methods(), *self._sweeps(), *self._replays(), *self._peers(), *self._large(), *scripts]

    def _script(self, name: str, script: Script) -> Part:
        arguments = script.arguments(self.model, self.quick)
        return Part(name, lambda _earlier, _url: arguments, needs=script.needs, large=script.large)

    def _methods(self) -> list[Part]:
        parts = []
        for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
            for batch in (1, 8, 32):
                count, length = (max(2, batch), 32) if self.quick else (max(8, batch), 128)
                options = ["--batch", str(batch), "--num-prompts", str(count), "--output-len", str(length)]
                # Batch 8 takes the least time, so it is repeated: several rounds even out the machine's drift.
                options += ["--rounds", "3" if batch == 8 and not self.quick else "1"]
                options += ["--temperature", str(temperature)]
                options += ["--settings", "headline" if self.quick else "all"]
                parts.append(_bench(f"methods-{name}-b{batch}", "methods", "--model", self.model, *options))
        return parts

    def _sweeps(self) -> list[Part]:
        """Closed loops: throughput against latency. Without a prefix cache, since all levels use the same prompts."""
        parts = []
        for method in ("blt", "auto"):
            for together in (1, 4) if self.quick else (1, 2, 4, 8, 16, 32, 64, 128):
                options = ["--max-concurrency", str(together), "--num-prompts", str(max(8, 3 * together))]
                options += ["--decoding", method, "--output-len", "128"]
                for level in LEVELS:
                    options += ["--goodput", level]
                server, rounds = ("fastblt", "--no-prefix-cache"), 1 if self.quick else 3
                parts.append(_bench(f"sweep-{method}-c{together}", "serve", *options, server=server, rounds=rounds))
        return parts

    def _replays(self) -> list[Part]:
        if self.traces is None:
            return []
        parts = []
        for name, (file, prompt, output) in _TRACES.items():
            sizes = ["--trace", str(self.traces / file), "--prompt-factor", prompt, "--output-factor", output]
            sizes += ["--max-prompt-bytes", "4000", "--max-output-bytes", "1000"]
            for level in LEVELS:
                sizes += ["--goodput", level]
            first = f"trace-{name}-saturation"
            rushed = ["--trace-rate", "1000", "--num-prompts", "20" if self.quick else "100", "--trace-first", "1000"]
            parts.append(_bench(first, "serve", *sizes, *rushed, server=("fastblt",)))
            parts.append(
                Part(
                    f"trace-{name}",
                    _replay(first, [*sizes, "--num-prompts", "30" if self.quick else "300"]),
                    ("fastblt",),
                )
            )
        return parts

    def _peers(self) -> list[Part]:
        size = ["--output-len", "16" if self.quick else "128", "--num-prompts", "1" if self.quick else "7"]
        parts = [
            Part(
                "peer-transformers",
                lambda _earlier, _url: [
                    "fastblt.benchmarks.report.peers",
                    "transformers",
                    "--model",
                    self.model,
                    *size,
                ],
                needs=("transformers",),
            )
        ]
        peers = {
            "llama-cpp": ("llama.cpp", ("llama_cpp", "gguf", "tokenizers")),
            "transformers-serve": ("transformers", ("transformers", "accelerate", "tokenizers")),
        }
        for name, (server, packages) in peers.items():
            for together in (1, 8):
                # 48 of its tokens are about 128 bytes. Strict servers refuse unknown fields such as ignore_eos.
                options = ["--max-concurrency", str(together), "--num-prompts", str(max(8, 3 * together))]
                options += ["--output-len", "48", "--no-ignore-eos"]
                parts.append(_bench(f"peer-{name}-c{together}", "serve", *options, server=(server,), needs=packages))
        return parts

    def _large(self) -> list[Part]:
        """The paper's shapes, widened in memory: 3 and 6 GB, since the shipped weights are bf16 values."""
        sizes = [("1b", 1, 4, 48, 0.0), ("1b-sampled", 1, 4, 48, 0.8), ("1b", 8, 8, 48, 0.0), ("3b", 1, 2, 48, 0.0)]
        parts = []
        for kind, batch, count, length, temperature in sizes:
            if self.quick:
                count, length = batch, 16
            options = ["--shape", kind[:2], "--batch", str(batch), "--num-prompts", str(count)]
            options += ["--settings", "headline", "--output-len", str(length), "--temperature", str(temperature)]
            parts.append(_bench(f"methods-{kind}-b{batch}", "methods", "--model", self.model, *options, large=True))
        return parts


def _bench(
    name: str,
    command: str,
    *options: str,
    server: tuple[str, ...] | None = None,
    needs: tuple[str, ...] = (),
    large: bool = False,
    rounds: int = 1,
) -> Part:
    def arguments(_earlier: Earlier, url: str) -> list[str]:
        where = ["--base-url", url, "--quiet"] if server else []
        return ["fastblt", "bench", command, *where, *options]

    return Part(name, arguments, server, needs, large, rounds)


def _replay(saturation: str, options: Sequence[str]) -> Callable[[Earlier, str], list[str]]:
    def arguments(earlier: Earlier, url: str) -> list[str]:
        if saturation not in earlier:
            raise LookupError(f"needs {saturation}, which is not there")
        rate = NEAR_SATURATION * float(earlier[saturation]["request_throughput"])
        where = ["--base-url", url, "--quiet"]
        return ["fastblt", "bench", "serve", *where, *options, "--trace-rate", f"{rate:.3f}"]

    return arguments


def missing(part: Part) -> list[str]:
    """Packages that a part needs and that are not installed."""
    return [name for name in part.needs if find_spec(name) is None]


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by the names of parts, sorted with b8 before b32."""
    paths = sorted(folder.glob("*.json"), key=lambda path: [part.zfill(3) for part in re.split(r"(\d+)", path.stem)])
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
