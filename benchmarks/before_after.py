"""Bytes a second of two checkouts of this repository, in turns: what a change to the engine brought.

    git worktree add ../before COMMIT
    python -m fastblt.benchmarks.before_after ../before   BLT, BLT-S k = 8, BLT-DV-8 and BLT-D-8 at 1, 8 and 32 requests

A process per checkout and turn, for a machine's speed drifts; requests start one pass after another, and are measured
while all of them run. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def once(requests: int, seconds: float) -> dict[str, float]:
    """Bytes a second of every method, of the checkout that this process imports from."""
    from fastblt.benchmarks.engine.holding import METHODS, endless, start_apart
    from fastblt.benchmarks.held_out import held_out_prompts
    from fastblt.benchmarks.savings.methods import diffusion
    from fastblt.models.checkpoint import load_checkpoint
    from fastblt.server.engine.engine import Engine
    from fastblt.server.request import DecodingMethod
    from fastblt.server.settings import PRETRAINED, EngineSettings

    model = load_checkpoint(str(PRETRAINED))
    prompts = held_out_prompts(requests, 256)
    speeds = {}
    methods = dict(METHODS)
    for method in (DecodingMethod.BLT_DV, DecodingMethod.BLT_D):
        methods[f"{method}-8 a0.7"] = diffusion(method, 8, "a0.7")
    for name, decoding in methods.items():
        engine = Engine(model, EngineSettings(max_running=requests))
        start_apart(engine, prompts, endless(decoding, requests, 0.0))
        before, clock = engine.stats().bytes_generated, time.perf_counter()
        while (passed := time.perf_counter() - clock) < seconds:
            engine.step()
        speeds[name] = (engine.stats().bytes_generated - before) / passed
    return speeds


def measure(before: Path, requests: list[int], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Of both checkouts, by method and requests: bytes a second in every round."""
    found: dict[str, dict[str, list[float]]] = {}
    for count in requests:
        for _ in range(rounds):
            for which, folder in (("before", before), ("after", HERE)):
                # -P: the script's own folder has modules that are named as packages are.
                command = [sys.executable, "-P", __file__, "--once", str(count), "--seconds", str(seconds)]
                environment = os.environ | {"PYTHONPATH": str(folder)}
                done = subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE)
                for name, speed in json.loads(done.stdout).items():
                    found.setdefault(f"{name}, {count}", {"before": [], "after": []})[which].append(speed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="another checkout")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once, args.seconds)))
        return
    if args.before is None:
        parser.error("give the folder of another checkout")
    found = measure(args.before.resolve(), args.requests, args.rounds, args.seconds)
    print("| method, requests | before, B/s | after | times |\n|---|---|---|---|")
    for name, row in found.items():
        old, new = (statistics.median(row[which]) for which in ("before", "after"))
        print(f"| {name} | {old:.0f} | {new:.0f} | {new / old:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
