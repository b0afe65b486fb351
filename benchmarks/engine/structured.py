"""Speed of structured output in the engine: JSON by schemas, a grammar, a list of choices and a regular expression.

python -m fastblt.benchmarks.engine.structured                       bytes a second by kind, at 1 and 16 requests
python -m fastblt.benchmarks.engine.structured --against ../before   beside another checkout, in turns
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from fastblt.benchmarks import checks
from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import complete, in_turns, start
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.request import SamplingParams, StructuredOutput
from fastblt.server.settings import PRETRAINED

_SCHEMAS = json.loads((Path(checks.__file__).parent / "schemas.json").read_text())
#: Unambiguous arithmetic.
_ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: /[0-9]{1,4}/ | "(" sum ")"
"""
_KINDS = {
    "schemas": [StructuredOutput.json(schema) for schema in _SCHEMAS],
    "arithmetic": [StructuredOutput.grammar(_ARITHMETIC)],
    "choice of 500": [StructuredOutput.choice([f"{i * 7919 % 100_003:06d} is one of them" for i in range(500)])],
    "regex": [StructuredOutput.regex(r"([a-z]{2,9} ){12}[a-z]+\.")],
}
_SETTINGS = ("blt", "blt-s k8")


def measure(
    *, model: str = str(PRETRAINED), requests: int = 16, length: int = 128, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Bytes a second of whole requests, at 1 and `requests` at once: in a fresh engine, and in one that has seen them.

    Outputs end at `length` bytes or where their structure does. Medians of `repeats`, in turns.
    """
    torch.set_num_threads(2)
    blt = load_checkpoint(model)
    prompts = held_out_prompts(requests, 128)

    def speed(kind: str, setting: str, batch: int) -> tuple[float, float]:
        structures, made, seconds = _KINDS[kind], [0, 0], [0.0, 0.0]
        # As many may run as by default: a part of them may have grammars that a process follows.
        engine = start(blt, 64)
        for again in range(2):
            # One request at a time, so that there are as many bytes to judge by.
            for first in range(0, requests, batch):
                params = [
                    SamplingParams(
                        max_tokens=length,
                        temperature=1.0,
                        seed=number,
                        structured_output=structures[number % len(structures)],
                        decoding=decoding(setting),
                    )
                    for number in range(first, first + batch)
                ]
                begin = time.perf_counter()
                made[again] += sum(len(o.ids) for o in complete(engine, prompts[first : first + batch], params))
                seconds[again] += time.perf_counter() - begin
        return made[0] / seconds[0], made[1] / seconds[1]

    calls = {
        f"{kind}, {setting}, {batch}": partial(speed, kind, setting, batch)
        for kind in _KINDS
        for setting in _SETTINGS
        for batch in (1, requests)
    }
    runs = in_turns(repeats, calls, warm_up=1)
    first, again = ({name: statistics.median(run[i] for run in own) for name, own in runs.items()} for i in range(2))
    table = Table("bytes a second of", "structure first seen", "seen before")
    for name in calls:
        table.row(name, f"{first[name]:.0f}", f"{again[name]:.0f}")
    return {"first seen": first, "seen before": again}


app = command(measure)

if __name__ == "__main__":
    app()
