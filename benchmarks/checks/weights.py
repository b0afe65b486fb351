"""What narrow weights change in what a model says: bits per byte, agreement of greedy bytes, acceptance.

    python -m fastblt.benchmarks.checks.weights                the shipped checkpoint
    python -m fastblt.benchmarks.checks.weights --shape 1b     the same function at the 1B shape

Bits per byte are those of held-out text, each byte given all before it, over `num_prompts` pieces of `length` bytes.
Patches are those of the first kind of weights; the entropy model is the same for all. `same choice`: of these
positions, the share with the first kind's most probable byte. Then `output_len` bytes are decoded, greedily, after
each piece's first half: `leading`, the share before the first byte that differs from the first kind's. Of every
drafting setting, the share of drafts that is accepted, and how many outputs differ from BLT's of the same weights:
the exit status is 1 if any does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import Output, complete, start, whole_length
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.benchmarks.text_statistics import leading_equal
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.packed import weight_bytes
from fastblt.models.widen import paper_shape, widen
from fastblt.server.settings import PRETRAINED


def scores(model: Blt, texts: Sequence[list[int]], starts: list[torch.Tensor]) -> tuple[float, list[int]]:
    """Bits per byte of texts of ids, and the most probable id at each position. `starts` are their patches; empty, it
    is filled with the model's own."""
    nats, choices = 0.0, []
    own = not starts
    for number, ids in enumerate(texts):
        with torch.inference_mode():
            found = model(torch.tensor([ids]), None if own else starts[number])
        if own:
            starts.append(found.starts)
        logits = found.logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
        choices += logits.argmax(-1).tolist()
    return nats / math.log(2) / sum(len(ids) - 1 for ids in texts), choices


def decoded(model: Blt, prompts: Sequence[list[int]], length: int, setting: str) -> list[Output]:
    engine = start(model, len(prompts), deterministic=True, prefix_cache=False, max_model_len=4096)
    return complete(engine, prompts, [whole_length(decoding(setting), length)] * len(prompts))


def measure(
    *,
    model: str = str(PRETRAINED),
    shape: str | None = None,
    weights: Sequence[str] = ("float32", "bfloat16", "float16", "int8"),
    setting: Sequence[str] = ("blt", "blt-s k16", "blt-dv-8 1step", "blt-dsv-4 k16"),
    num_prompts: int = 16,
    length: int = 512,
    output_len: int = 64,
) -> dict[str, Any]:
    """Print and return the table. `setting` begins with blt."""
    texts = held_out_prompts(num_prompts, length)
    prompts = [ids[: len(ids) // 2] for ids in texts]
    starts: list[torch.Tensor] = []
    rows: dict[str, Any] = {}
    choices: list[int] = []
    plain: list[Output] = []
    table = Table(
        "weights", "bytes a weight", "bits/byte", "same choice %", "leading %", *(f"{s} acc %" for s in setting[1:])
    )
    for kind in weights:
        if shape is None:
            blt = load_checkpoint(model, weights=kind)
        else:
            blt = widen(load_checkpoint(model), paper_shape(shape), kind)
        bits, own = scores(blt, texts, starts)
        outputs = {name: decoded(blt, prompts, output_len, name) for name in setting}
        written = outputs[setting[0]]
        choices, plain = choices or own, plain or written
        drafts = {name: outputs[name] for name in setting[1:]}
        rows[kind] = {
            "bytes_per_weight": weight_bytes(blt),
            "bits_per_byte": bits,
            "same_choice": statistics.mean(a == b for a, b in zip(own, choices, strict=True)),
            "leading": statistics.mean(
                leading_equal(a.ids, b.ids) / len(b.ids) for a, b in zip(written, plain, strict=True)
            ),
            "acceptance": {
                name: sum(o.ledger.accepted for o in of) / max(1, sum(o.ledger.drafted for o in of))
                for name, of in drafts.items()
            },
            "not_lossless": sum(a.ids != b.ids for of in drafts.values() for a, b in zip(of, written, strict=True)),
        }
        row = rows[kind]
        shares = (row["same_choice"], row["leading"], *row["acceptance"].values())
        table.row(kind, f"{row['bytes_per_weight']:.2f}", f"{bits:.4f}", *(f"{100 * share:.1f}" for share in shares))
    passed = not any(row["not_lossless"] for row in rows.values())
    print(f"\nlossless against blt of the same weights: {'all' if passed else 'NOT ALL'}")
    return {**measured_with(model), "shape": shape, "weights": rows, "passed": passed}


app = command(measure)

if __name__ == "__main__":
    app()
