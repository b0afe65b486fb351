"""The widened checkpoint is the small one: logits and entropies over held-out text, and greedy bytes.

    python -m fastblt.benchmarks.checks.widened                the 1B shape (6.4 GB of memory; some three minutes)
    python -m fastblt.benchmarks.checks.widened --shape 3b     the 3B shape (12 GB)

Exit status 1 where logits or entropies differ by more than 1e-4, or any greedy byte, pass or accepted draft does.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fastblt.benchmarks.engine.holding import METHODS
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import SHAPES, paper_shape, widen
from fastblt.server.engine.engine import Engine
from fastblt.server.request import Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

TOLERANCE = 1e-4

#: What a greedy run is: its bytes, and what was drafted and computed for them.
Run = tuple[list[int], tuple[int, ...]]


@torch.no_grad()
def differences(small: Blt, wide: Blt, prompts: list[list[int]]) -> tuple[float, float]:
    """The largest of logits and of entropies (nats), over prompts of one length and with the small model's patches."""
    ids = torch.tensor(prompts)
    expected = small(ids)
    found = wide(ids, expected.starts)
    logits, entropies = found.logits - expected.logits, found.entropies - expected.entropies
    return float(logits.abs().max()), float(entropies.abs().max())


def greedy(model: Blt, prompts: list[list[int]], length: int) -> dict[str, list[Run]]:
    """By method, a run for every prompt."""
    runs: dict[str, list[Run]] = {}
    for name, decoding in METHODS.items():
        engine = Engine(model, EngineSettings(max_running=len(prompts), max_model_len=1024))
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, decoding=decoding)
        for at, ids in enumerate(prompts):
            engine.add(Request(str(at), ids, params, 0.0))
        made: dict[str, list[int]] = {str(at): [] for at in range(len(prompts))}
        counted: dict[str, tuple[int, ...]] = {}
        while engine.has_work():
            for delta in engine.step():
                made[delta.request_id] += delta.ids
                if (ledger := delta.ledger) is not None:
                    numbers = (ledger.global_, ledger.decoder, ledger.rounds, ledger.drafted, ledger.accepted)
                    counted[delta.request_id] = numbers
        runs[name] = [(made[key], counted[key]) for key in made]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--bytes", type=int, default=32)
    args = parser.parse_args()
    small = load_checkpoint(args.model)
    wide = widen(small, paper_shape(args.shape))
    prompts = held_out_prompts(2, 128)
    logits, entropies = differences(small, wide, prompts)
    weights = sum(parameter.numel() for parameter in wide.parameters())
    print(f"{weights:,} weights: logits differ by at most {logits:.1e}, entropies by {entropies:.1e}")
    expected, found = greedy(small, prompts, args.bytes), greedy(wide, prompts, args.bytes)
    for name in expected:
        said = "equal" if found[name] == expected[name] else "DIFFER"
        print(f"{name}: bytes, passes and drafts of {len(prompts)} prompts, {args.bytes} bytes each: {said}")
    sys.exit(max(logits, entropies) > TOLERANCE or found != expected)


if __name__ == "__main__":
    main()
