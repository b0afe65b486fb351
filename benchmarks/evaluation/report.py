"""The page of published figures, made from the JSON files that `publish` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fastblt.benchmarks.evaluation import diversity, likelihood, quality
from fastblt.benchmarks.evaluation.journal import Record


def page(folder: Path) -> str:
    """The page in Markdown, with a section for every result in the folder. Raises ValueError if there is none."""
    found = {name: json.loads(path.read_text()) for name in _SECTIONS if (path := folder / f"{name}.json").is_file()}
    if not found:
        raise ValueError(f"{folder} has no results; run python -m fastblt.benchmarks.evaluation.publish")
    sections = [f"## {_TITLES[name]}\n\n{_SECTIONS[name](result)}" for name, result in found.items()]
    return "\n\n".join((_HEAD, *sections)) + "\n"


_HEAD = """# Evaluation of the shipped checkpoint

Written by `python -m fastblt.benchmarks.evaluation.publish`, beside the JSON of the same run. What each number means is
in [evaluation.md](../evaluation.md). The figures are of the checkpoint that shipped when they were made; its
fingerprint (the log-likelihood of a fixed text, in nats) stands with each part."""


def _made(result: Record) -> str:
    """The checkpoint and the conditions of a result, as a sentence."""
    text = f"Fingerprint {result['model']['fingerprint']}"
    if result["made"]["scale"] != 1:
        text += f"; --scale {result['made']['scale']:g}"
    return text + (", while other jobs ran." if result["made"]["other_jobs"] else ".")


def _humaneval(result: Record) -> str:
    own = result["own_solutions"]
    lines = [
        f"{_made(result)} All 164 problems, greedy, at most {result['max_tokens']} bytes. Of HumanEval's own solutions "
        f"{own['solved']} pass, of the broken ones {own['broken']}.",
        "",
        "| setting | pass@1 % | passed | bytes | bytes/s | decoder NFE | global NFE | what ended the others |",
        f"|{'---|' * 8}",
    ]
    for setting, row in result["settings"].items():
        ends = ", ".join(f"{kind} {count}" for kind, count in list(row["failures"].items())[:3])
        lines.append(
            f"| {setting} | {100 * row['pass_at_1']:.1f} | {row['passed']} of {row['programs']} | {row['bytes']} "
            f"| {row['bytes_per_second']:.0f} | {row['decoder_nfe']:.1f} | {row['global_nfe']:.1f} | {ends} |"
        )
    return "\n".join(lines)


def _quality(result: Record) -> str:
    return (
        f"{_made(result)} {result['prompts']} places, {result['length']} bytes each; "
        f"{result['concurrency']} requests at a time, and {result['alone']} one at a time.\n\n"
        f"![quality against speed](quality.png)\n\n{quality.table(result['settings'])}"
    )


def _diversity(result: Record) -> str:
    return (
        f"{_made(result)} {result['samples']} samples of {result['length']} bytes a point.\n\n"
        f"![diversity against decoder passes](diversity.png)\n\n{diversity.table(result['points'])}"
    )


def _bits(result: Record) -> str:
    whole = result["all"]
    return (
        f"{_made(result)} Held-out files, in pieces of {result['length']} bytes: **{whole['bits_per_byte']:.4f}** bits "
        f"per byte of {whole['bytes']} bytes."
    )


def _likelihood(result: Record) -> str:
    return (
        f"{_made(result)} Which of four lines of a held-out file comes next, in ARC's format, through "
        f"lm-evaluation-harness; chance is 25 %. Its {result['log_likelihoods']} log-likelihoods are at most "
        f"{result['largest_difference']:.1e} nats from the model's own.\n\n{likelihood.table(result)}"
    )


_SECTIONS: dict[str, Callable[[Record], str]] = {
    "humaneval": _humaneval,
    "quality": _quality,
    "diversity": _diversity,
    "bits": _bits,
    "likelihood": _likelihood,
}
_TITLES = {
    "humaneval": "HumanEval",
    "quality": "Quality against speed",
    "diversity": "Diversity against decoder passes",
    "bits": "Bits per byte",
    "likelihood": "Multiple choice by likelihood",
}
