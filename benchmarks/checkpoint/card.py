"""The model card: the README.md in the folder of exported weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastblt.models.blt import Blt
from fastblt.models.training.record import Record, Run, listed

_TEXT = """---
license: apache-2.0
language: [code]
library_name: fastblt
tags: [byte-latent-transformer, diffusion, python]
---
# FastBLT: a small BLT-D for Python

A Byte Latent Transformer with a diffusion head, {millions:.1f} million parameters ({tables:.1f} million of them hash
tables), for trying out and testing FastBLT on any machine. It runs as `blt`, `blt-s`, `blt-d`, `blt-dv` and `blt-dsv`
(blocks of {blocks}). It completes Python in the manner of the standard library and repeats itself soon: an instrument,
not an assistant.

* **Made by** `fastblt train` (`docs/training.md`) on two CPU cores, in {runs}{averaged}; {total}.
* **Trained on** the source of CPython 3.11's standard library and its tests, as installed with the interpreter
  (copyright Python Software Foundation, PSF License Version 2), {packages}. Digest of the last run's text:
  `{sha256}`.
* **Weights**: bf16, the entropy model fp32. Patches: entropy above {threshold} nats, at most {longest} bytes.

All that follows comes from `python -m fastblt.benchmarks.checkpoint.tables`, which says what is what.

{prediction}

Drafts along held-out text, greedy (BLT-DV in one step, its first byte from the pending byte's own row; "paper": drafts
on the open patch closed by force, two upstream passes a round):

{along_greedy}

The same, sampled at temperature 0.8:

{along_sampled}

Decoding, greedy, from held-out prompts, on the model's own text:

{decoding_greedy}

The same, sampled at temperature 0.8:

{decoding_sampled}

Of the first lines it writes after the {prompts} HumanEval prompts, {parsed} are Python there and {doctest} begin a
doctest.

## Samples

Greedy, after the bar.

{samples}
"""


def card(
    record: Record,
    model: Blt,
    tables: Mapping[str, str],
    lines: Mapping[str, int],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    """The card's text, from tables by name, the counts of `lines`, and samples with `prompt` and `text`."""
    runs = record.runs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _TEXT.format(
        millions=parameters / 1e6,
        tables=model.encoder_hash_tok_embedding.weight.numel() / 1e6,
        blocks=", ".join(map(str, model.config.block_sizes)),
        runs="one run" if len(runs) == 1 else f"{len(runs)} runs",
        averaged=_averaged(record.averaged),
        total=_total(runs),
        sha256=(record.corpus.model_extra or {})["sha256"],
        packages=_packages(record.corpus.packages),
        threshold=model.config.patching_threshold,
        longest=model.config.max_patch_length,
        samples="\n\n".join(f"```python\n{sample['prompt']}|{sample['text']}\n```" for sample in samples),
        **tables,
        **lines,
    )


def _packages(versions: Mapping[str, str]) -> str:
    if not versions:
        return "and on nothing else"
    named = ", ".join(f"{name} {version}".strip() for name, version in versions.items())
    return (
        "and in later runs on that of packages with BSD, MIT, Apache, PSF and HPND licenses, without their tests and "
        f"what held-out files say too: {named}"
    )


def _averaged(shares: Mapping[int, float]) -> str:
    if not shares:
        return ""
    alike = max(shares.values()) - min(shares.values()) < 1e-6
    named = list(shares) if alike else [f"{number} ({100 * share:.3g} %)" for number, share in shares.items()]
    return f", by `fastblt average` of the weights after runs {listed(named)}"


def _total(runs: Sequence[Run]) -> str:
    minutes, entropy = sum(run.minutes for run in runs), sum(run.entropy_minutes for run in runs)
    steps, megabytes = sum(run.steps for run in runs), sum(run.megabytes for run in runs)
    processor = [run.processor_minutes for run in runs if run.processor_minutes is not None]
    spent = f" ({sum(processor):.0f} processor minutes in the last {len(processor)})" if processor else ""
    return (
        f"{minutes:.0f} minutes{spent} after {entropy:.0f} for its entropy model: {megabytes:.1f} MB of text in "
        f"{steps} steps"
    )
