"""Everything there is to know about a checkpoint, in one table each: prediction, drafts, decoding, text.

    python -m fastblt.benchmarks.checkpoint.tables                 the shipped checkpoint
    python -m fastblt.benchmarks.checkpoint.tables FOLDER --write
        and put the tables into its README.md, acceptance into config.json

Minutes on one core. "Along held-out text" drafts at positions of a given text (`benchmarks.checkpoint.teacher_forced`);
"decoding" is the engine's, on the model's own text, whose loops flatter every figure: the share of texts that end in
one (the last 64 bytes have a period of at most 32) and the share of distinct runs of four bytes stand beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastblt.benchmarks.checkpoint.card import card
from fastblt.benchmarks.checkpoint.teacher_forced import Drafter, Rounds, blocks, know
from fastblt.benchmarks.evaluation.python_lines import first_line, humaneval_texts, parses
from fastblt.benchmarks.held_out import held_out_prompts, held_out_sources
from fastblt.benchmarks.savings.methods import batch_settings, figures, paper_settings, run
from fastblt.benchmarks.text_statistics import distinct4, loops
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import CONFIG_FILE, load_checkpoint
from fastblt.models.patching import PatchRule
from fastblt.models.training.corpus import chunks, stream
from fastblt.models.training.entropy import measure as measure_patcher
from fastblt.models.training.entropy import patch_starts
from fastblt.models.training.evaluate import evaluate, leak_check
from fastblt.models.training.layout import Start
from fastblt.models.training.loop import write_atomically
from fastblt.models.vocabulary import decode, encode, with_bos
from fastblt.server.engine.engine import Engine
from fastblt.server.request import SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

TEMPERATURE = 0.8
#: Bytes of a held-out sequence, as in training, and from where on drafts are made along it.
LENGTH, CONTEXT = 1024, 256
BLT_D_THRESHOLD = 0.7

SAMPLES = (
    "def mean(values):\n",
    'class Stack:\n    """A last-in first-out stack."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\n",
    "for name in sorted(names):\n    if name",
    "def read_lines(path):\n    with open(path) as",
)

Table = list[dict[str, Any]]


def held_out_chunks() -> NDArray[np.uint16]:
    """The held-out text in sequences of LENGTH ids, as training cuts it."""
    return chunks(stream([source.data for source in held_out_sources()]), LENGTH)


def prediction(model: Blt, text: NDArray[np.uint16]) -> dict[str, Any]:
    """`evaluate`, and the leak check of every kind of start and block size."""
    result = evaluate(model, text)
    rule = PatchRule(model.config.patching_threshold, model.config.max_patch_length)
    few = text[:: max(1, len(text) // 4)][:4, : LENGTH // 2]
    starts = patch_starts(measure_patcher(model.patcher, model.config.patcher, few)[0], rule)
    result["leak"] = {
        f"{kind.name.lower()} B={size}": vars(leak_check(model, few, starts, kind, size, blocks=6))
        for kind in Start
        for size in model.config.block_sizes
    }
    return result


def drafters(sizes: Iterable[int]) -> list[Drafter]:
    lengths = [("blt-s", length) for length in (4, 8, 16)] + [("blt-dv", size) for size in sizes]
    return [Drafter(method, length, paper) for method, length in lengths for paper in (False, True)]


def along_text(model: Blt, text: NDArray[np.uint16], temperature: float) -> Table:
    """Rows of drafts along held-out sequences, and of BLT-D's blocks."""
    parameters = ModuleParameters.of(model)
    rounds = {drafter: Rounds() for drafter in drafters(model.config.block_sizes)}
    agreement: dict[int, list[float]] = {size: [] for size in model.config.block_sizes}
    for number, ids in enumerate(text):
        known = know(model, torch.from_numpy(ids.astype(np.int64)), temperature, seed=number)
        for drafter, total in rounds.items():
            total.go(model, known, drafter, CONTEXT)
        for size, shares in agreement.items():
            places = np.arange(CONTEXT, LENGTH - size, size)
            made = blocks(model, known, size, places, BLT_D_THRESHOLD)
            wanted = known.choices.numpy()[places[:, None] + np.arange(size)]
            shares.append(float((made == wanted).mean()))
    rows: Table = [
        {
            "draft": drafter.name,
            "acceptance": total.acceptance,
            "bytes_a_round": total.bytes_a_round,
            "weights": total.weights(parameters),
        }
        for drafter, total in rounds.items()
    ]
    rows += [
        {"draft": f"blt-d-{size} a{BLT_D_THRESHOLD}", "agreement": float(np.mean(shares))}
        for size, shares in agreement.items()
    ]
    return rows


def decoding(model: Blt, prompts: Sequence[list[int]], length: int, temperature: float) -> Table:
    """Rows of the engine's decoding of the model's own text."""
    wanted = {"blt"} | {drafter.name for drafter in drafters(model.config.block_sizes)}
    wanted |= {f"blt-d-{size} a{BLT_D_THRESHOLD}" for size in model.config.block_sizes}
    rows: Table = []
    plain = None
    for name, params in paper_settings(model.config.block_sizes).items():
        if name not in wanted:
            continue
        sampling = [
            SamplingParams(max_tokens=length, temperature=temperature, seed=seed, ignore_eos=True, decoding=params)
            for seed in range(len(prompts))
        ]
        batch = run(Engine(model, batch_settings(prompts, length)), prompts, sampling)
        plain = plain or batch
        rows.append({"setting": name, **figures(batch, plain)})
    return rows


def greedy(model: Blt, prompts: Sequence[list[int]], length: int) -> list[bytes]:
    """Plain greedy text after each prompt."""
    params = [SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for _ in prompts]
    settings: EngineSettings = batch_settings(prompts, length)
    return [decode(output.ids) for output in run(Engine(model, settings), prompts, params).outputs]


def lines(model: Blt, together: int = 41, context: int = 900, length: int = 96) -> dict[str, int]:
    """How many greedy first lines after the HumanEval prompts are Python there, and how many begin a doctest."""
    texts = humaneval_texts()
    written: list[str] = []
    for first in range(0, len(texts), together):
        prompts = [with_bos(encode(text.encode()[-context:])) for text in texts[first : first + together]]
        written += [first_line(text.decode("utf-8", "replace")) for text in greedy(model, prompts, length)]
    return {
        "prompts": len(texts),
        "parsed": sum(parses(text, line) for text, line in zip(texts, written, strict=True)),
        "doctest": sum(line.lstrip().startswith(">>>") for line in written),
    }


def measure(model: Blt, *, sequences: int, prompts: int, length: int) -> dict[str, Any]:
    """All figures, each part printed as it is done."""
    text = held_out_chunks()
    result: dict[str, Any] = {
        "threshold": model.config.patching_threshold,
        "max_patch_length": model.config.max_patch_length,
    }
    result["prediction"] = prediction(model, text)
    print(prediction_table(result), flush=True)
    some = text[:: max(1, len(text) // sequences)][:sequences]
    begun = held_out_prompts(prompts, CONTEXT)
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        result[f"along_{name}"] = along_text(model, some, temperature)
        print(f"\nAlong held-out text, {name}:\n\n{along_table(result[f'along_{name}'])}", flush=True)
        result[f"decoding_{name}"] = decoding(model, begun, length, temperature)
        print(f"\nDecoding, {name}:\n\n{decoding_table(result[f'decoding_{name}'])}", flush=True)
    result["lines"] = lines(model)
    print(f"\nFirst lines after HumanEval prompts: {result['lines']}\n")
    samples = greedy(model, [with_bos(encode(prompt.encode())) for prompt in SAMPLES], 160)
    result["samples"] = [
        {"prompt": prompt, "text": text.decode("utf-8", "replace"), "loop": loops(text), "distinct4": distinct4(text)}
        for prompt, text in zip(SAMPLES, samples, strict=True)
    ]
    for sample in result["samples"]:
        print(f"```python\n{sample['prompt']}|{sample['text']}\n```")
    return result


def prediction_table(result: dict[str, Any]) -> str:
    figures = result["prediction"]
    head = [
        "| held-out text | |",
        "|---|---|",
        f"| bits per byte, causal head | {figures['bits_per_byte']:.3f} |",
        f"| most likely byte right | {figures['top1']:.1%} |",
        f"| bits per byte, entropy model | {figures['patcher_bits_per_byte']:.3f} |",
        f"| threshold, nats; longest patch | {result['threshold']}; {result['max_patch_length']} |",
        f"| bytes per patch | {figures['bytes_per_patch']:.2f} |",
    ]
    levels = list(next(iter(figures["masked_accuracy"]["patch"].values())))
    head += [
        "",
        "Masked bytes predicted right by share t masked, and leading right bytes of a fully masked block:",
        "",
        f"| start, block | {' | '.join(levels)} | leading | by position at t = 1 |",
        f"|{'---|' * (len(levels) + 3)}",
    ]
    for kind, sizes in figures["masked_accuracy"].items():
        for size, row in sizes.items():
            by_position = " ".join(f"{value:.2f}".lstrip("0") for value in figures["by_position"][kind][size])
            cells = " | ".join(f"{value:.3f}" for value in row.values())
            head.append(f"| {kind}, {size} | {cells} | {figures['leading_correct'][kind][size]:.2f} | {by_position} |")
    worst = max(leak["largest"] for leak in figures["leak"].values())
    asked = sum(leak["asked"] for leak in figures["leak"].values())
    differ = max(abs(leak["trained"] - leak["served"]) / leak["asked"] for leak in figures["leak"].values())
    head += [
        "",
        f"Leak check, {asked} masked bytes over all starts and blocks: logits in training and in decoding differ by at "
        f"most {worst:.0e}, accuracy by {100 * differ:.1f} points.",
    ]
    return "\n".join(head)


def along_table(rows: Table) -> str:
    lines = [
        "| draft | acceptance % | bytes a round | weights a byte, of BLT's | agreement % |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "agreement" in row:
            lines.append(f"| {row['draft']} | | | | {100 * row['agreement']:.1f} |")
        else:
            cells = f"{100 * row['acceptance']:.1f} | {row['bytes_a_round']:.2f} | {row['weights']:.2f}"
            lines.append(f"| {row['draft']} | {cells} | |")
    return "\n".join(lines)


def decoding_table(rows: Table) -> str:
    lines = [
        "| setting | acceptance % | bytes a round | bytes a patch | weights a byte, of BLT's | equal to BLT % "
        "| loops % | distinct |",
        f"|{'---|' * 8}",
    ]
    for row in rows:
        drafted = row["acceptance"] is not None
        cells = f"{100 * row['acceptance']:.1f} | {row['bytes_a_round']:.2f}" if drafted else " | "
        patch = "" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}"
        rest = f"{100 * row['equal_positions']:.1f} | {100 * row['loops']:.0f} | {row['distinct4']:.2f}"
        lines.append(f"| {row['setting']} | {cells} | {patch} | {1 - row['gb_saved']:.2f} | {rest} |")
    return "\n".join(lines)


def write(folder: Path, model: Blt, result: dict[str, Any]) -> None:
    """Put the tables into the folder's model card, and the acceptance along held-out text into its `config.json`."""
    tables = {
        "prediction": prediction_table(result),
        "along_greedy": along_table(result["along_greedy"]),
        "along_sampled": along_table(result["along_sampled"]),
        "decoding_greedy": decoding_table(result["decoding_greedy"]),
        "decoding_sampled": decoding_table(result["decoding_sampled"]),
    }
    text = card(folder, model, tables, result["lines"], result["samples"])
    acceptance = {
        row["draft"]: round(row["acceptance"], 4)
        for row in result["along_greedy"]
        if "acceptance" in row and not row["draft"].endswith("paper")
    }
    config = json.dumps(replace(model.config, acceptance=acceptance).to_dict(), indent=2) + "\n"
    write_atomically(folder / "README.md", lambda to: to.write_text(text))
    write_atomically(folder / CONFIG_FILE, lambda to: to.write_text(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=PRETRAINED)
    parser.add_argument("--sequences", type=int, default=12, help="held-out sequences that drafts are made along")
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts to decode from")
    parser.add_argument("--bytes", type=int, default=128, help="bytes to decode after each")
    parser.add_argument("--write", action="store_true", help="into the checkpoint's README.md and config.json")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_checkpoint(args.model)
    result = measure(model, sequences=args.sequences, prompts=args.prompts, length=args.bytes)
    if args.write:
        write(args.model, model, result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
