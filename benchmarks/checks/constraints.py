"""Checks constrained output on the shipped checkpoint: JSON by schema, strict UTF-8, and the cost of the masks.

    python -m fastblt.benchmarks.checks.constraints   200 outputs a method and temperature, 1,000 a method in UTF-8
    python -m fastblt.benchmarks.checks.constraints --outputs 20 --utf8 100

*Schemas*: held-out prompts, each with one of the schemas of `schemas.json`, by BLT, BLT-S and BLT-DV, greedy and
sampled, mixed in one deterministic engine. An output is valid if it parses and validates (package jsonschema), and
equal if it equals BLT's. *UTF-8*: completions of 1 to 64 bytes at temperature 1.5 by every method, half of them with a
bias towards bytes beyond ASCII. The last column says how many outputs of the same requests without `strict` are UTF-8.
*Cost*: bytes a processor second with strict UTF-8, and with a grammar that any text satisfies, relative to the same
requests without constraints; medians of alternating runs. The exit status is 1 if any output fails.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import torch

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import Output, complete, in_turns, start, whole_length
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import BYTE_OFFSET, decode, encode
from fastblt.server.request import Ledger, SamplingParams, StructuredOutput, Utf8
from fastblt.server.settings import PRETRAINED

SCHEMAS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("schemas.json").read_text())

#: Enough for the outputs in practice. The longest that the schemas allow, with whitespace, exceeds any max_model_len.
_MAX_TOKENS = 2000

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


@dataclass
class Checked:
    """Counts of the outputs of one setting, and a description of each invalid one."""

    outputs: int = 0
    valid: int = 0
    equal: int = 0
    bytes: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    failures: list[str] = field(default_factory=list)


@dataclass
class Utf8Tally:
    """Outputs of one method with `strict`, and how many of the same requests give UTF-8 without it."""

    outputs: int = 0
    decoded: int = 0
    beyond_ascii: int = 0
    decoded_free: int = 0


def verified_settings(block_size: int) -> list[str]:
    """BLT, and settings whose outputs must equal BLT's."""
    return ["blt", "blt-s k8", f"blt-dv-{block_size} 1step", f"blt-dv-{block_size} a0.3"]


def run_all(
    model: Blt, prompts: Sequence[list[int]], params: Sequence[SamplingParams], *, deterministic: bool = False
) -> list[Output]:
    """Run requests in one engine. A request may end in an error."""
    engine = start(model, 64, deterministic=deterministic, max_waiting=len(prompts))
    return complete(engine, prompts, params, errors=True)


def check_schemas(model: Blt, count: int, temperature: float, seed: int = 0) -> dict[str, Checked]:
    """Check `count` outputs of every setting. Number i has prompt i and the schemas in turn."""
    prompts = held_out_prompts(count, 128)
    settings = verified_settings(max(model.config.block_sizes))
    jobs = [(setting, number) for setting in settings for number in range(count)]
    random.Random(seed).shuffle(jobs)
    schemas = [SCHEMAS[number % len(SCHEMAS)] for number in range(count)]
    asked, params = [], []
    for setting, number in jobs:
        ask = encode(f"\n# An example of {schemas[number]['title']}, as JSON:\n".encode())
        asked.append(prompts[number] + ask)
        params.append(
            SamplingParams(
                max_tokens=_MAX_TOKENS,
                temperature=temperature,
                seed=seed + number,
                structured_output=StructuredOutput.json(schemas[number]),
                decoding=decoding(setting),
            )
        )
    done = dict(zip(jobs, run_all(model, asked, params, deterministic=True), strict=True))
    table: dict[str, Checked] = {}
    for setting in settings:
        checked = table[setting] = Checked()
        for number, schema in enumerate(schemas):
            output = done[setting, number]
            text, problem = decode(output.ids), _problem(output, schema)
            checked.outputs += 1
            checked.valid += problem is None
            checked.equal += output.ids == done["blt", number].ids
            checked.bytes += len(text)
            checked.ledger.add(output.ledger)
            if problem is not None:
                checked.failures.append(f"{number}: {problem}: {text[:200]!r}")
    return table


def _problem(output: Output, schema: dict[str, Any]) -> str | None:
    try:
        jsonschema.validate(json.loads(decode(output.ids)), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{output.finish_reason}, {type(error).__name__}"
    return None if output.finish_reason == "stop" else str(output.finish_reason)


def check_utf8(model: Blt, count: int) -> dict[str, Utf8Tally]:
    """Check `count` outputs of every method, with and without `strict`."""
    size = max(model.config.block_sizes)
    settings = {
        "blt": "blt",
        "blt-s": "blt-s k8",
        "blt-d": f"blt-d-{size} a0.7",
        "blt-d 1step": f"blt-d-{size} 1step",
        "blt-dv": f"blt-dv-{size} 1step",
    }
    some = held_out_prompts(min(count, 200), 64)
    prompts = [some[number % len(some)] for number in range(count)]
    beyond = [(byte + BYTE_OFFSET, 8.0) for byte in range(0x80, 0xF5)]
    table: dict[str, Utf8Tally] = {}
    for name, setting in settings.items():
        tally = table[name] = Utf8Tally()
        for utf8 in Utf8:
            params = [
                SamplingParams(
                    max_tokens=1 + number % 64,
                    temperature=1.5,
                    seed=number,
                    # A request may bias at most a hundred ids.
                    logit_bias=dict(random.Random(number).sample(beyond, 100)) if number % 2 else {},
                    utf8=utf8,
                    decoding=decoding(setting),
                )
                for number in range(count)
            ]
            texts = [decode(output.ids) for output in run_all(model, prompts, params)]
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
    """Bytes a processor second relative to those without a constraint, by method and constraint."""
    prompts = held_out_prompts(requests, 128)
    any_text = StructuredOutput.grammar("start: /(?s:.)*/")
    constraints: dict[str, dict[str, Any]] = {
        "free": {},
        "strict UTF-8": {"utf8": Utf8.STRICT},
        "grammar": {"structured_output": any_text},
    }
    size = max(model.config.block_sizes)
    settings = {
        "blt": "blt",
        "blt-s k8": "blt-s k8",
        f"blt-d-{size}": f"blt-d-{size} a0.7",
        f"blt-dv-{size}": f"blt-dv-{size} 1step",
    }

    def speed(setting: str, fields: dict[str, Any]) -> float:
        params = [replace(whole_length(decoding(setting), length), **fields)] * requests
        engine, clock = start(model, requests), time.process_time()
        made = sum(len(output.ids) for output in complete(engine, prompts, params))
        return made / (time.process_time() - clock)

    table: dict[str, dict[str, float]] = {}
    for name, setting in settings.items():
        # BLT-D refuses grammars.
        kinds = {kind: fields for kind, fields in constraints.items() if kind != "grammar" or "blt-d-" not in setting}
        calls = {kind: partial(speed, setting, fields) for kind, fields in kinds.items()}
        medians = {kind: statistics.median(own) for kind, own in in_turns(repeats, calls, warm_up=1).items()}
        table[name] = {kind: value / medians["free"] for kind, value in medians.items()}
    return table


def check(*, model: str = str(PRETRAINED), outputs: int = 200, utf8: int = 1000, repeats: int = 5) -> dict[str, Any]:
    """Check `outputs` JSON outputs of each setting and temperature, and `utf8` outputs of each method.

    Each cost is measured `repeats` times.
    """
    torch.set_num_threads(1)
    blt = load_checkpoint(model)
    result: dict[str, Any] = {}
    passed = True
    for title, temperature in TEMPERATURES.items() if outputs else ():
        checks = check_schemas(blt, outputs, temperature)
        result[title] = {name: asdict(checked) for name, checked in checks.items()}
        print(f"\nschemas, {title}")
        table = Table("setting", "outputs", "valid", "equal to BLT", "bytes", "accepted of a draft")
        for name, one in checks.items():
            share = f"{one.ledger.accepted / one.ledger.drafted:.1%}" if one.ledger.drafted else ""
            table.row(name, *map(str, (one.outputs, one.valid, one.equal, one.bytes)), share)
            passed &= one.valid == one.equal == one.outputs
        for name, one in checks.items():
            for failure in one.failures[:3]:
                print(f"{name}: {failure}")
    if utf8:
        tallies = check_utf8(blt, utf8)
        result["utf8"] = {name: asdict(tally) for name, tally in tallies.items()}
        print("\nstrict UTF-8 at temperature 1.5")
        table = Table("method", "outputs", "decode", "of these beyond ASCII", "decode without strict")
        for name, tally in tallies.items():
            table.row(name, *map(str, (tally.outputs, tally.decoded, tally.beyond_ascii, tally.decoded_free)))
            passed &= tally.decoded == tally.outputs
    if repeats:
        result["cost"] = cost(blt, repeats)
        print("\nbytes a processor second over those without a constraint")
        table = Table("method", "strict UTF-8", "grammar")
        for name, row in result["cost"].items():
            table.row(name, f"{row['strict UTF-8']:.2f}", f"{row['grammar']:.2f}" if "grammar" in row else "")
    return result | {"passed": passed}


app = command(check)

if __name__ == "__main__":
    app()
