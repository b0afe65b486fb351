"""What each decoding method saves on the shipped checkpoint, over held-out prompts: the paper's settings, one a row.

    python -m benchmarks.methods                    24 prompts of 256 bytes, 256 bytes each, greedy
    python -m benchmarks.methods --temperature 0.8  the same, sampled with a seed a prompt

Passes are those of each request's own ledger, the prompt's included, and both GB figures are estimates made of them
(means over requests, saved against BLT). "bytes/s" is wall clock: the whole batch at once on this machine, the prompts'
pass left out. BLT-S and BLT-DV give BLT's bytes, BLT-D does not: `leading` is the share of its bytes before the first
that differs, `equal` the share of equal positions. `loops` and `distinct` tell how much of the text repeats itself,
which flatters every other figure. The second table compares drafts on the newest closed latent (one upstream pass a
round) with the paper's, on the open patch closed by force (two).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out import held_out_prompts
from benchmarks.text_statistics import distinct4, equal_positions, leading_equal, loops
from models.accounting import gb, gb_paper
from models.blt import Blt, CausalAttention
from models.checkpoint import load_checkpoint
from models.patching import PatchRule, entropies
from server.engine.engine import Engine
from server.request import DecodingMethod, DecodingParams, FinishReason, Ledger, Request, SamplingParams, Unmasking
from server.settings import PRETRAINED, EngineSettings

BLT = DecodingParams(DecodingMethod.BLT)


def speculation(length: int, *, paper: bool = False) -> DecodingParams:
    """BLT-S with drafts of `length` bytes."""
    return DecodingParams(DecodingMethod.BLT_S, draft_length=length, paper_accounting=paper)


def diffusion(method: DecodingMethod, size: int, rule: str, **more: bool) -> DecodingParams:
    """BLT-D or BLT-DV; `rule` is a0.7 (confidence), g1.5 (entropy) or 1step, as in the paper's tables."""
    if rule == "1step":
        return DecodingParams(method, block_size=size, unmasking=Unmasking.ONE_STEP, **more)
    bound = float(rule[1:])
    if rule[0] == "a":
        return DecodingParams(
            method, block_size=size, unmasking=Unmasking.CONFIDENCE, confidence_threshold=bound, **more
        )
    return DecodingParams(method, block_size=size, unmasking=Unmasking.ENTROPY, entropy_bound=bound, **more)


def paper_settings(sizes: Sequence[int]) -> dict[str, DecodingParams]:
    """BLT and the settings of the paper's tables (digest §13) for a checkpoint of these block sizes, by name.

    Drafting methods come with both accountings ("paper": two upstream passes a round), BLT-D a0.7 also aligned.
    """
    settings = {"blt": BLT}
    for length in (4, 8, 16):
        for suffix, paper in (("", False), (" paper", True)):
            settings[f"blt-s k{length}{suffix}"] = speculation(length, paper=paper)
    for size in sizes:
        for rule in ("a0.5", "a0.7", "g0.8", "g1.0"):
            settings[f"blt-d-{size} {rule}"] = diffusion(DecodingMethod.BLT_D, size, rule)
        settings[f"blt-d-{size} a0.7 aligned"] = diffusion(DecodingMethod.BLT_D, size, "a0.7", align_blocks=True)
    for size in sizes:
        for rule in ("a0.3", "g1.5", "g2.0", "1step"):
            for suffix, paper in (("", False), (" paper", True)):
                settings[f"blt-dv-{size} {rule}{suffix}"] = diffusion(
                    DecodingMethod.BLT_DV, size, rule, paper_accounting=paper
                )
    return settings


@dataclass
class Output:
    """What one request gave, and what it cost on its own."""

    ids: list[int]
    ledger: Ledger


@dataclass
class Batch:
    """Outputs of requests that ran together, in order, and the bytes per second after the prompts' pass."""

    outputs: list[Output]
    bytes_per_second: float


def run(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Batch:
    """Run requests to their ends, all at once. Raises RuntimeError where one ends in an error."""
    outputs = {str(index): Output([], Ledger()) for index in range(len(prompts))}
    for (name, _), ids, one in zip(outputs.items(), prompts, params, strict=True):
        engine.add(Request(name, ids, one, time.monotonic()))
    clock, before = 0.0, 0
    while engine.has_work():
        for delta in engine.step():
            output = outputs[delta.request_id]
            output.ids += delta.ids
            if delta.finish_reason == FinishReason.ERROR:
                raise RuntimeError(delta.error)
            output.ledger = delta.ledger or output.ledger
        if not clock:
            clock, before = time.perf_counter(), sum(len(output.ids) for output in outputs.values())
    made = sum(len(output.ids) for output in outputs.values()) - before
    return Batch(list(outputs.values()), made / (time.perf_counter() - clock))


@torch.inference_mode()
def patches_begun(model: Blt, prompt: list[int], ids: list[int]) -> int:
    """How many patches of a whole text begin among the bytes after its prompt."""
    text = torch.tensor([prompt + ids])
    config = model.config
    entropy = entropies(model.patcher(text, CausalAttention(config.patcher, text.shape[1], text.device)))
    starts = PatchRule(config.patching_threshold, config.max_patch_length).starts(entropy[0].tolist())
    return sum(starts[len(prompt) : text.shape[1]])


def figures(model: Blt, prompts: Sequence[list[int]], batch: Batch, plain: Batch) -> dict[str, Any]:
    """A row of the table; `plain` is the batch of BLT over the same prompts."""
    outputs, base = batch.outputs, plain.outputs
    made = sum(len(output.ids) for output in outputs)
    drafted, accepted, rounds = (sum(getattr(o.ledger, n) for o in outputs) for n in ("drafted", "accepted", "rounds"))
    texts = [output.ids for output in outputs]
    pairs = [(one.ids, other.ids) for one, other in zip(outputs, base, strict=True)]
    return {
        "acceptance": accepted / drafted if drafted else None,
        "bytes_a_round": made / rounds if rounds else None,
        "decoder_per_byte": _mean(o.ledger.decoder / len(o.ids) for o in outputs),
        "upstream_per_byte": _mean(o.ledger.global_ / len(o.ids) for o in outputs),
        "bytes_per_patch": made / max(1, sum(map(patches_begun, [model] * len(prompts), prompts, texts))),
        "gb_paper_saved": 1 - _mean(gb_paper(o.ledger) for o in outputs) / _mean(gb_paper(o.ledger) for o in base),
        "gb_saved": 1 - _mean(gb(o.ledger) for o in outputs) / _mean(gb(o.ledger) for o in base),
        "leading_equal": _mean(leading_equal(*pair) / len(pair[0]) for pair in pairs),
        "equal_positions": _mean(equal_positions(*pair) / len(pair[0]) for pair in pairs),
        "loops": _mean(loops(ids) for ids in texts),
        "distinct4": _mean(distinct4(ids) for ids in texts),
        "bytes_per_second": batch.bytes_per_second,
    }
