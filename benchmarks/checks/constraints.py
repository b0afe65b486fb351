"""Constrained output on the shipped checkpoint: JSON by schema, strict UTF-8, and what the masks cost.

    python -m fastblt.benchmarks.checks.constraints        200 outputs a method and temperature, 1,000 a method in UTF-8
    python -m fastblt.benchmarks.checks.constraints --outputs 20 --utf8 100

*Schemas*: held-out prompts, each with one of the schemas of `data/schemas.json`, in BLT, BLT-S and BLT-DV, greedy and
sampled, mixed in one deterministic engine. An output is valid if it parses and validates (by the package jsonschema),
and equal if it is BLT's. *UTF-8*: completions of 1 to 64 bytes at temperature 1.5, half of them with a bias to bytes
that ASCII has not, in every method; the last column says how many of the same requests decode without `strict`.
*Cost*: bytes a processor second of the same requests free, with strict UTF-8, and under a grammar that any text
satisfies, as ratios of the median of alternating runs. Any output that fails makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema
import torch

from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.methods import BLT, diffusion, speculation
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import BYTE_OFFSET, decode, encode
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    Delta,
    Ledger,
    Request,
    SamplingParams,
    StructuredOutput,
    Utf8,
)
from fastblt.server.settings import PRETRAINED, EngineSettings

SCHEMAS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("schemas.json").read_text())

#: Room for the longest output that the schemas allow, whitespace included, is more than any model takes.
_MAX_TOKENS = 2000

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


@dataclass
class Checked:
    """Outputs of one setting: how many are as they should be, and the first few that are not."""

    outputs: int = 0
    valid: int = 0
    equal: int = 0
    bytes: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    failures: list[str] = field(default_factory=list)


@dataclass
class Utf8Tally:
    """Outputs of one method under `strict`, and how many decode when the same is asked without."""

    outputs: int = 0
    decoded: int = 0
    beyond_ascii: int = 0
    decoded_free: int = 0


def verified_settings(block_size: int) -> dict[str, DecodingParams]:
    """BLT, and what must equal it."""
    return {
        "blt": BLT,
        "blt-s k8": speculation(8),
        f"blt-dv-{block_size} 1step": diffusion(DecodingMethod.BLT_DV, block_size, "1step"),
        f"blt-dv-{block_size} a0.3": diffusion(DecodingMethod.BLT_DV, block_size, "a0.3"),
    }


def run_all(model: Blt, requests: list[Request], *, deterministic: bool = True) -> tuple[dict[str, Delta], float]:
    """Run requests in one engine: each one's last delta, with all ids in it, and the processor's seconds."""
    settings = EngineSettings(deterministic=deterministic, max_running=64, max_waiting=len(requests))
    engine = Engine(model, settings)
    for request in requests:
        engine.add(request)
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    done: dict[str, Delta] = {}
    clock = time.process_time()
    while engine.has_work():
        for delta in engine.step():
            ids[delta.request_id] += delta.ids
            if delta.finish_reason is not None:
                done[delta.request_id] = replace(delta, ids=ids[delta.request_id])
    return done, time.process_time() - clock


def check_schemas(model: Blt, count: int, temperature: float, seed: int = 0) -> dict[str, Checked]:
    """`count` outputs of every setting; prompts and schemas in turn."""
    prompts = held_out_prompts(count, 128)
    settings = verified_settings(max(model.config.block_sizes))
    requests, schemas = [], {}
    for setting, decoding in settings.items():
        for number, prompt in enumerate(prompts):
            schema = SCHEMAS[number % len(SCHEMAS)]
            params = SamplingParams(
                max_tokens=_MAX_TOKENS,
                temperature=temperature,
                seed=seed + number,
                structured_output=StructuredOutput.json(schema),
                decoding=decoding,
            )
            name = f"{setting}/{number}"
            schemas[name] = schema
            ask = encode(f"\n# An example of {schema['title']}, as JSON:\n".encode())
            requests.append(Request(name, prompt + ask, params, time.monotonic()))
    random.Random(seed).shuffle(requests)
    done, _ = run_all(model, requests)
    table: dict[str, Checked] = {}
    for setting in settings:
        checked = table[setting] = Checked()
        for number in range(count):
            delta = done[f"{setting}/{number}"]
            text = decode(delta.ids)
            problem = _problem(delta, schemas[f"{setting}/{number}"])
            checked.outputs += 1
            checked.valid += problem is None
            checked.equal += delta.ids == done[f"blt/{number}"].ids
            checked.bytes += len(text)
            checked.ledger.add(delta.ledger or Ledger())
            if problem is not None:
                checked.failures.append(f"{number}: {problem}: {text[:200]!r}")
    return table


def _problem(delta: Delta, schema: dict[str, Any]) -> str | None:
    try:
        jsonschema.validate(json.loads(decode(delta.ids)), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{delta.finish_reason}, {type(error).__name__}"
    return None if delta.finish_reason == "stop" else str(delta.finish_reason)


def check_utf8(model: Blt, count: int) -> dict[str, Utf8Tally]:
    """`count` outputs of every method, with and without `strict`."""
    size = max(model.config.block_sizes)
    settings = {
        "blt": BLT,
        "blt-s": speculation(8),
        "blt-d": diffusion(DecodingMethod.BLT_D, size, "a0.7"),
        "blt-d 1step": diffusion(DecodingMethod.BLT_D, size, "1step"),
        "blt-dv": diffusion(DecodingMethod.BLT_DV, size, "1step"),
    }
    prompts = held_out_prompts(min(count, 200), 64)
    beyond = {byte + BYTE_OFFSET: 8.0 for byte in range(0x80, 0xF5)}
    table: dict[str, Utf8Tally] = {}
    for setting, decoding in settings.items():
        tally = table[setting] = Utf8Tally()
        for utf8 in Utf8:
            requests = [
                Request(
                    str(number),
                    prompts[number % len(prompts)],
                    SamplingParams(
                        max_tokens=1 + number % 64,
                        temperature=1.5,
                        seed=number,
                        # A hundred ids are as many as a request may bias.
                        logit_bias=dict(random.Random(number).sample(list(beyond.items()), 100)) if number % 2 else {},
                        utf8=utf8,
                        decoding=decoding,
                    ),
                    time.monotonic(),
                )
                for number in range(count)
            ]
            texts = [decode(delta.ids) for delta in run_all(model, requests, deterministic=False)[0].values()]
            decoded = sum(_decodes(text) for text in texts)
            if utf8 == Utf8.STRICT:
                tally.outputs, tally.decoded = len(texts), decoded
                tally.beyond_ascii = sum(not text.isascii() for text in texts)
            else:
                tally.decoded_free = decoded
    return table


def _decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def cost(model: Blt, repeats: int, requests: int = 32, length: int = 128) -> dict[str, dict[str, float]]:
    """Bytes a processor second, as ratios to those without a constraint, by method and constraint."""
    prompts = held_out_prompts(requests, 128)
    any_text = StructuredOutput.grammar("start: /(?s:.)*/")
    constraints: dict[str, dict[str, Any]] = {
        "free": {},
        "strict UTF-8": {"utf8": Utf8.STRICT},
        "grammar": {"structured_output": any_text},
    }
    size = max(model.config.block_sizes)
    settings = {
        "blt": BLT,
        "blt-s k8": speculation(8),
        f"blt-d-{size}": diffusion(DecodingMethod.BLT_D, size, "a0.7"),
        f"blt-dv-{size}": diffusion(DecodingMethod.BLT_DV, size, "1step"),
    }
    table: dict[str, dict[str, float]] = {}
    for setting, decoding in settings.items():
        speeds: dict[str, list[float]] = {name: [] for name in constraints}
        for _ in range(repeats + 1):
            for name, fields in constraints.items():
                if name == "grammar" and decoding.method == DecodingMethod.BLT_D:
                    continue
                asked = [
                    Request(
                        str(number),
                        prompt,
                        SamplingParams(
                            max_tokens=length, temperature=0.0, ignore_eos=True, decoding=decoding, **fields
                        ),
                        time.monotonic(),
                    )
                    for number, prompt in enumerate(prompts)
                ]
                done, seconds = run_all(model, asked, deterministic=False)
                speeds[name].append(sum(len(delta.ids) for delta in done.values()) / seconds)
        # The first run of each warms up.
        medians = {name: statistics.median(values[1:]) for name, values in speeds.items() if values}
        table[setting] = {name: value / medians["free"] for name, value in medians.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--outputs", type=int, default=200, help="JSON outputs of each setting and temperature")
    parser.add_argument("--utf8", type=int, default=1000, help="UTF-8 outputs of each method")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each cost")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(args.model)
    result: dict[str, Any] = {}
    failed = False
    for title, temperature in TEMPERATURES.items() if args.outputs else ():
        table = check_schemas(model, args.outputs, temperature)
        result[title] = {name: asdict(checked) for name, checked in table.items()}
        print(f"\nschemas, {title}\n| setting | outputs | valid | equal to BLT | bytes | accepted of a draft |")
        print("|---|---|---|---|---|---|")
        for name, one in table.items():
            share = f"{one.ledger.accepted / one.ledger.drafted:.1%}" if one.ledger.drafted else ""
            print(f"| {name} | {one.outputs} | {one.valid} | {one.equal} | {one.bytes} | {share} |", flush=True)
            failed |= one.valid < one.outputs or one.equal < one.outputs
        for name, one in table.items():
            for failure in one.failures[:3]:
                print(f"{name}: {failure}")
    if args.utf8:
        by_method = check_utf8(model, args.utf8)
        result["utf8"] = {name: asdict(tally) for name, tally in by_method.items()}
        print("\nstrict UTF-8 at temperature 1.5")
        print("| method | outputs | decode | of these beyond ASCII | decode without strict |\n|---|---|---|---|---|")
        for name, tally in by_method.items():
            print(f"| {name} | {tally.outputs} | {tally.decoded} | {tally.beyond_ascii} | {tally.decoded_free} |")
            failed |= tally.decoded < tally.outputs
    if args.repeats:
        ratios = result["cost"] = cost(model, args.repeats)
        print("\nbytes a processor second over those without a constraint")
        print("| method | strict UTF-8 | grammar |\n|---|---|---|")
        for name, row in ratios.items():
            grammar = f"{row['grammar']:.2f}" if "grammar" in row else ""
            print(f"| {name} | {row['strict UTF-8']:.2f} | {grammar} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
