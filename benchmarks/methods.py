"""What each decoding method saves on the shipped checkpoint, over held-out prompts: the paper's settings, one a row.

    python -m benchmarks.methods                    24 prompts of 256 bytes, 256 bytes each, greedy
    python -m benchmarks.methods --temperature 0.8  the same, sampled with a seed a prompt

Passes are those of each request's own ledger, the prompt's included, and both GB figures are estimates made of them, as
saved against BLT. "bytes/s" is wall clock: the whole batch at once on this machine, the prompts'
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out import held_out_prompts
from benchmarks.text_statistics import distinct4, equal_positions, leading_equal, loops
from models.blt import Blt
from models.checkpoint import load_checkpoint
from server.engine.engine import Engine
from server.request import (
    MAX_BLOCK_SIZE,
    DecodingMethod,
    DecodingParams,
    FinishReason,
    Ledger,
    Request,
    SamplingParams,
    Unmasking,
)
from server.settings import PRETRAINED, EngineSettings

BLT = DecodingParams(DecodingMethod.BLT)


def speculation(length: int, *, paper: bool = False) -> DecodingParams:
    """BLT-S with drafts of `length` bytes."""
    return DecodingParams(DecodingMethod.BLT_S, draft_length=length, paper_accounting=paper)


def diffusion(
    method: DecodingMethod, size: int, rule: str, *, align_blocks: bool = False, paper: bool = False
) -> DecodingParams:
    """BLT-D or BLT-DV; `rule` is a0.7 (confidence), g1.5 (entropy) or 1step, as in the paper's tables."""
    confidence = bound = None
    if rule == "1step":
        unmasking = Unmasking.ONE_STEP
    elif rule.startswith("a"):
        unmasking, confidence = Unmasking.CONFIDENCE, float(rule[1:])
    else:
        unmasking, bound = Unmasking.ENTROPY, float(rule[1:])
    return DecodingParams(
        method,
        block_size=size,
        unmasking=unmasking,
        confidence_threshold=confidence,
        entropy_bound=bound,
        align_blocks=align_blocks,
        paper_accounting=paper,
    )


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
                settings[f"blt-dv-{size} {rule}{suffix}"] = diffusion(DecodingMethod.BLT_DV, size, rule, paper=paper)
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


def figures(batch: Batch, plain: Batch) -> dict[str, Any]:
    """A row of the table; `plain` is the batch of BLT over the same prompts."""
    outputs, base = batch.outputs, plain.outputs
    texts = [output.ids for output in outputs]
    pairs = list(zip(texts, (output.ids for output in base), strict=True))
    total, before = _total(outputs), _total(base)
    # The prompt's own pass gives the first byte of what is verified.
    in_rounds = total.bytes - (len(outputs) if total.drafted else 0)
    return {
        "acceptance": total.accepted / total.drafted if total.drafted else None,
        "bytes_a_round": in_rounds / total.rounds if total.rounds else None,
        "decoder_per_byte": statistics.mean(o.ledger.decoder / len(o.ids) for o in outputs),
        "upstream_per_byte": statistics.mean(o.ledger.global_ / len(o.ids) for o in outputs),
        "bytes_per_patch": total.bytes_per_patch,
        "gb_paper_saved": 1 - total.gb_paper / before.gb_paper,
        "gb_saved": 1 - total.gb / before.gb,
        "leading_equal": statistics.mean(leading_equal(*pair) / len(pair[0]) for pair in pairs),
        "equal_positions": statistics.mean(equal_positions(*pair) / len(pair[0]) for pair in pairs),
        "loops": statistics.mean(map(loops, texts)),
        "distinct4": statistics.mean(map(distinct4, texts)),
        "bytes_per_second": batch.bytes_per_second,
    }


def _total(outputs: list[Output]) -> Ledger:
    total = Ledger()
    for output in outputs:
        total.add(output.ledger)
    return total


def latent_question(batches: dict[str, Batch]) -> dict[str, Any]:
    """Acceptance of each draft on the newest closed latent and on the paper's, with the difference paired by prompt."""
    rows = {}
    for name, batch in batches.items():
        if (forced := batches.get(f"{name} paper")) is None:
            continue
        closed, paper = ([_acceptance(o) for o in b.outputs] for b in (batch, forced))
        differences = [one - other for one, other in zip(closed, paper, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        rows[name] = {
            "closed": statistics.mean(closed),
            "forced": statistics.mean(paper),
            "difference": statistics.mean(differences),
            "standard_error": spread / len(differences) ** 0.5,
        }
    return rows


def _acceptance(output: Output) -> float:
    return output.ledger.accepted / max(1, output.ledger.drafted)


def measure(
    model: Blt,
    prompts: Sequence[list[int]],
    length: int,
    temperature: float = 0.0,
    settings: dict[str, DecodingParams] | None = None,
) -> dict[str, Any]:
    """Run every setting over the prompts, printing a row of a table for each."""
    settings = settings or paper_settings(model.config.block_sizes)
    rows: dict[str, dict[str, Any]] = {}
    batches: dict[str, Batch] = {}
    print(_HEADER)
    for name, decoding in settings.items():
        params = [
            SamplingParams(max_tokens=length, temperature=temperature, seed=seed, ignore_eos=True, decoding=decoding)
            for seed in range(len(prompts))
        ]
        batches[name] = run(Engine(model, batch_settings(prompts, length)), prompts, params)
        rows[name] = figures(batches[name], batches["blt"])
        print(_row(name, rows[name]), flush=True)
    latents = latent_question(batches)
    print("\n| draft | closed latent % | forced latent % | difference, points |\n|---|---|---|---|")
    for name, row in latents.items():
        error = f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}"
        print(f"| {name} | {_percent(row['closed'])} | {_percent(row['forced'])} | {error} |")
    return {"settings": rows, "draft_latent": latents}


def batch_settings(prompts: Sequence[list[int]], length: int) -> EngineSettings:
    """All requests run at once, and the prompts take one pass."""
    longest = max(map(len, prompts)) + MAX_BLOCK_SIZE
    rows = max(512, len(prompts) * longest)
    return EngineSettings(max_running=len(prompts), max_pass_rows=rows, max_model_len=longest + length + 4096)


_COLUMNS = (
    "acc % | bytes/round | dec/byte | up/byte | bytes/patch | GB paper saved % | GB saved % | leading % | equal %"
)
_HEADER = f"| setting | {_COLUMNS} | loops % | distinct | bytes/s |\n|{'---|' * 13}"


def _row(name: str, row: dict[str, Any]) -> str:
    rounds = "-" if row["bytes_a_round"] is None else f"{row['bytes_a_round']:.2f}"
    patch = "-" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}"
    passes = f"{row['decoder_per_byte']:.3f} | {row['upstream_per_byte']:.3f} | {patch}"
    percents = ("gb_paper_saved", "gb_saved", "leading_equal", "equal_positions", "loops")
    rest = " | ".join(_percent(row[key]) for key in percents)
    return (
        f"| {name} | {_percent(row['acceptance'])} | {rounds} | {passes} | {rest} | {row['distinct4']:.3f} "
        f"| {row['bytes_per_second']:.0f} |"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-length", type=int, default=256, help="bytes of each prompt")
    parser.add_argument("--bytes", type=int, default=256, help="bytes to decode for each prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--only", help="settings whose names contain this, beside blt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_checkpoint(args.model)
    settings = paper_settings(model.config.block_sizes)
    if args.only:
        settings = {name: s for name, s in settings.items() if name == "blt" or args.only in name}
    prompts = held_out_prompts(args.prompts, args.prompt_length)
    result = measure(model, prompts, args.bytes, args.temperature, settings)
    if args.json:
        run_settings = {k: v for k, v in vars(args).items() if k not in ("model", "json")}
        result |= {"run": run_settings | {"threads": torch.get_num_threads()}}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
