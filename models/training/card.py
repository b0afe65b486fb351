"""The README.md that lies beside exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import BltConfig

_TEXT = """---
license: apache-2.0
language: [code]
library_name: fastblt
tags: [byte-latent-transformer, diffusion, python]
---
# FastBLT: a small BLT-D for Python

A Byte Latent Transformer with a diffusion head, {millions:.1f} million parameters ({tables:.1f} million of them hash
tables), for trying out and testing FastBLT on any machine. It runs as `blt`, `blt-s`, `blt-d` and `blt-dv`
(blocks of {blocks}). It completes Python in the manner of the standard library and repeats itself soon: an instrument,
not an assistant.

* **Made by** `fastblt train` (`docs/training.md`), from nothing, on two CPU cores, in {minutes:.0f} minutes after
  {entropy_minutes:.0f} for its entropy model: {megabytes:.1f} MB of text in {steps} steps.
* **Trained on** the source of CPython 3.11's standard library and its tests, as installed with the interpreter
  (copyright Python Software Foundation, PSF License Version 2), and on nothing else. Digest of the prepared text:
  `{sha256}`.
* **Weights**: bf16, the entropy model fp32. Patches: entropy above {threshold} nats, at most {longest} bytes.

| held-out text ({held_out} sequences of {length} bytes, 2 % of the files) | |
|---|---|
| bits per byte, causal head | {bits:.3f} |
| most likely byte right | {top1:.1%} |
| bits per byte, entropy model | {patcher_bits:.3f} |
| bytes per patch | {patch:.2f} |
{rows}

Right predictions of masked bytes, by share t of a block that is masked:

| {head} |
|{rule}|
{table}
"""


def model_card(
    config: BltConfig, parameters: Mapping[str, int], run: Mapping[str, Any], figures: Mapping[str, Any]
) -> str:
    """The card's text. `parameters`: counts `all` and `tables`; `run`: what training cost; `figures`: of `report`."""
    rows = [
        f"| leading right bytes of a fully masked block, {size} | {value:.2f} |"
        for size, value in figures["leading_correct"].items()
    ]
    lines = figures.get("human_eval_lines")
    if lines:
        count = f"{lines['parsed']} of {lines['prompts']}"
        rows.append(f"| first line after a HumanEval prompt is Python there (`docs/training.md`) | {count} |")
    accuracy = figures["masked_accuracy"]
    levels = list(next(iter(accuracy.values())))
    return _TEXT.format(
        millions=parameters["all"] / 1e6,
        tables=parameters["tables"] / 1e6,
        blocks=", ".join(map(str, config.block_sizes)),
        threshold=config.patching_threshold,
        longest=config.max_patch_length,
        bits=figures["bits_per_byte"],
        top1=figures["top1"],
        patcher_bits=figures["patcher_bits_per_byte"],
        patch=figures["bytes_per_patch"],
        rows="\n".join(rows),
        head="block | " + " | ".join(levels),
        rule="|".join(["---"] * (len(levels) + 1)),
        table="\n".join(
            f"| {size} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |" for size, row in accuracy.items()
        ),
        **run,
    )
