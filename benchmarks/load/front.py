"""What HTTP and streaming cost: a server under a closed loop, and the engine alone on the same prompts, in turns.

    python -m fastblt.benchmarks.load.front    32 streams, 96 prompts of 256 bytes, 128 bytes each

The server's client runs on the same cores, and its time counts as the front's: it reads and does nothing else
(`benchmarks/load/lean_client.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from fastblt.benchmarks.checks.soak import serving
from fastblt.benchmarks.load.lean_client import stream_all
from fastblt.benchmarks.load.names import Dataset
from fastblt.benchmarks.load.offline import throughput
from fastblt.benchmarks.load.workload import prompts
from fastblt.benchmarks.machine import measured_with
from fastblt.server.llm import LLM
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import PRETRAINED


def measure(model: str, streams: int, count: int, length: int, rounds: int, method: DecodingMethod) -> dict[str, Any]:
    """Bytes a second of both in every round, and the median share that the front takes."""
    decoding = DecodingParams(method)
    options = ["--max-running", str(streams), "--no-prefix-cache"]
    served: list[float] = []
    alone: list[float] = []
    with serving(model, options) as server:
        llm = LLM(model, max_running=streams, prefix_cache=False)
        for seed in range(rounds):
            texts = [text.encode() for text, _ in prompts(Dataset.HELD_OUT, count, 256, seed)]
            asked = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "decoding": {"method": method.value}}
            bodies = [{"prompt": text.decode(), **asked} for text in texts]
            stream_all(server.port, bodies[:1], 1)
            seconds, tokens = stream_all(server.port, bodies, streams)
            if set(tokens) != {length}:
                raise RuntimeError(f"completions of {length} bytes were asked for; {sorted(set(tokens))} came")
            served.append(sum(tokens) / seconds)
            alone.append(throughput(llm, texts, length, decoding)["output_bytes_per_second"])
    shares = [1 - one / other for one, other in zip(served, alone, strict=True)]
    return {
        "method": method.value,
        "streams": streams,
        "served": served,
        "alone": alone,
        "front_share": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--bytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measured_with(args.model) | {"runs": []}
    for method in (DecodingMethod.BLT, DecodingMethod.AUTO):
        row = measure(args.model, args.streams, args.num_prompts, args.bytes, args.rounds, method)
        result["runs"].append(row)
        served, alone = (statistics.median(row[name]) for name in ("served", "alone"))
        print(
            f"{method.value}: {served:.0f} B/s served, {alone:.0f} alone; the front takes "
            f"{100 * row['front_share']:.1f} %",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
