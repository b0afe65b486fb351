"""Tables about a checkpoint: prediction, drafts, decoding, text.

    python -m fastblt.benchmarks.checkpoint.tables                 the shipped checkpoint
    python -m fastblt.benchmarks.checkpoint.tables FOLDER --write  of another, into its README.md and config.json

It takes minutes on one core. "Along held-out text" are drafts at positions of a given text
(`benchmarks.checkpoint.teacher_forced`). "Decoding" is the engine's, on the model's own text. Loops in that text
inflate all figures, so the table also has the share of texts that end in a loop (the last 64 bytes have a period of at
most 32) and the share of distinct runs of four bytes. "Kept by the filter" are the bytes of BLT-DSV's blocks that the
decoder agrees with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from fastblt.benchmarks.checkpoint.card import card
from fastblt.benchmarks.checkpoint.teacher_forced import Drafter, Rounds, blocks, know
from fastblt.benchmarks.command import command
from fastblt.benchmarks.evaluation.next_lines import first_line, parses
from fastblt.benchmarks.harness import complete, whole_length
from fastblt.benchmarks.markdown import percent, table
from fastblt.benchmarks.prompts import held_out_prompts, held_out_sources, humaneval_texts
from fastblt.benchmarks.savings.batches import engine_of
from fastblt.benchmarks.savings.methods import figures
from fastblt.benchmarks.settings import decoding as decoding_of
from fastblt.benchmarks.settings import longer, papers
from fastblt.benchmarks.text_statistics import distinct4, loops
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import CONFIG_FILE, load_checkpoint
from fastblt.models.config import SAMPLED
from fastblt.models.patching import PatchRule
from fastblt.models.training.corpus import chunks, stream
from fastblt.models.training.entropy import measure as measure_patcher
from fastblt.models.training.entropy import patch_starts
from fastblt.models.training.evaluate import evaluate, leak_check
from fastblt.models.training.files import write_atomically
from fastblt.models.training.layout import Start
from fastblt.models.training.record import RUNS_FILE, Record, read_record
from fastblt.models.vocabulary import decode, encode, with_bos
from fastblt.server.settings import PRETRAINED

TEMPERATURE = 0.8
#: Ids of a held-out sequence, as in training, and the position from which drafts are made along it.
LENGTH, CONTEXT = 1024, 256
BLT_D_THRESHOLD = 0.7

SAMPLES = (
    "def mean(values):\n",
    'class Stack:\n    """A last-in first-out stack."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\n",
    "for name in sorted(names):\n    if name",
    "def read_lines(path):\n    with open(path) as",
)

Rows = list[dict[str, Any]]


def held_out_chunks() -> NDArray[np.uint16]:
    """The held-out text in sequences of LENGTH ids, cut as in training: uint16 [N, LENGTH]."""
    return chunks(stream([source.data for source in held_out_sources()]), LENGTH)


def prediction(model: Blt, text: NDArray[np.uint16]) -> dict[str, Any]:
    """The results of `evaluate`, and of `leak_check` for every kind of start and block size."""
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


def along_text(model: Blt, text: NDArray[np.uint16], temperature: float) -> Rows:
    """Rows of the table for drafts, and for BLT-D's blocks, along held-out sequences."""
    parameters = ModuleParameters.of(model.config)
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
    rows: Rows = [
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


def decoding(model: Blt, prompts: Sequence[list[int]], length: int, temperature: float) -> Rows:
    """Rows of the table for the engine's decoding, on the model's own text."""
    sizes = model.config.block_sizes
    wanted = {"blt", "blt-s k32"} | {drafter.name for drafter in drafters(sizes)}
    wanted |= {f"blt-d-{size} a{BLT_D_THRESHOLD}" for size in sizes} | {f"blt-dsv-{size} k32" for size in sizes}
    rows: Rows = []
    plain = None
    for name in [*papers(sizes), *longer(sizes)]:
        if name in wanted:
            params = [whole_length(decoding_of(name), length, temperature, seed) for seed in range(len(prompts))]
            outputs = complete(engine_of(model, prompts, length), prompts, params)
            plain = plain or outputs
            rows.append({"setting": name, **figures(outputs, plain)})
    return rows


def own_acceptance(greedy: Rows, sampled: Rows) -> dict[str, float]:
    """Acceptance on the model's own text by setting, greedy and sampled: where `auto` begins. Of BLT-DSV it is the
    share of a block's bytes that the decoder's filter keeps, since its drafts are those of BLT-S."""
    found = {}
    for rows, suffix in ((greedy, ""), (sampled, SAMPLED)):
        for row in rows:
            share = row["filter" if row["setting"].startswith("blt-dsv") else "acceptance"]
            if share is not None and not row["setting"].endswith("paper"):
                found[row["setting"] + suffix] = round(share, 4)
    return found


def greedy(model: Blt, prompts: Sequence[list[int]], length: int) -> list[bytes]:
    """The greedy text of BLT after each prompt."""
    params = [whole_length(decoding_of("blt"), length)] * len(prompts)
    return [decode(output.ids) for output in complete(engine_of(model, prompts, length), prompts, params)]


def lines(model: Blt, together: int = 41, context: int = 900, length: int = 96) -> dict[str, int]:
    """How many greedy first lines after the HumanEval prompts parse, and how many begin a doctest."""
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
    """All figures. Each part is printed as soon as it is done."""
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
    head = (
        ("bits per byte, causal head", f"{figures['bits_per_byte']:.3f}"),
        ("most likely byte right", f"{figures['top1']:.1%}"),
        ("bits per byte, entropy model", f"{figures['patcher_bits_per_byte']:.3f}"),
        ("threshold, nats; longest patch", f"{result['threshold']}; {result['max_patch_length']}"),
        ("bytes per patch", f"{figures['bytes_per_patch']:.2f}"),
    )
    levels = list(next(iter(figures["masked_accuracy"]["patch"].values())))
    masked = []
    for kind, sizes in figures["masked_accuracy"].items():
        for size, row in sizes.items():
            by_position = " ".join(f"{value:.2f}".lstrip("0") for value in figures["by_position"][kind][size])
            cells = [f"{value:.3f}" for value in row.values()]
            masked.append([f"{kind}, {size}", *cells, f"{figures['leading_correct'][kind][size]:.2f}", by_position])
    leaks = figures["leak"].values()
    worst = max(leak["largest"] for leak in leaks)
    differ = max(abs(leak["trained"] - leak["served"]) / leak["asked"] for leak in leaks)
    return "\n\n".join(
        [
            table(("held-out text", ""), head),
            "Masked bytes predicted right by share t masked, and leading right bytes of a fully masked block:",
            table(("start, block", *levels, "leading", "by position at t = 1"), masked),
            f"Leak check, {sum(leak['asked'] for leak in leaks)} masked bytes over all starts and blocks: logits in "
            f"training and in decoding differ by at most {worst:.0e}, accuracy by {100 * differ:.1f} points.",
        ]
    )


def along_table(rows: Rows) -> str:
    cells = []
    for row in rows:
        if "agreement" in row:
            cells.append([row["draft"], "", "", "", percent(row["agreement"], 1)])
        else:
            figures = (percent(row["acceptance"], 1), f"{row['bytes_a_round']:.2f}", f"{row['weights']:.2f}")
            cells.append([row["draft"], *figures, ""])
    return table(("draft", "acceptance %", "bytes a round", "weights a byte, of BLT's", "agreement %"), cells)


def decoding_table(rows: Rows) -> str:
    columns = (
        "setting",
        "acceptance %",
        "kept by the filter %",
        "bytes a round",
        "bytes a patch",
        "decoder passes a byte",
        "weights a byte, of BLT's",
        "equal to BLT %",
    )
    cells = [
        [
            row["setting"],
            percent(row["acceptance"], 1),
            percent(row["filter"], 1),
            "" if row["acceptance"] is None else f"{row['bytes_a_round']:.2f}",
            "" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}",
            f"{row['decoder_per_byte']:.3f}",
            f"{1 - row['gb_saved']:.2f}",
            percent(row["equal_positions"], 1),
            percent(row["loops"]),
            f"{row['distinct4']:.2f}",
        ]
        for row in rows
    ]
    return table((*columns, "loops %", "distinct"), cells)


def write(folder: Path, record: Record, model: Blt, result: dict[str, Any]) -> None:
    """Write the tables to the folder's model card, and the acceptance on its own text to its `config.json`."""
    tables = {
        "prediction": prediction_table(result),
        "along_greedy": along_table(result["along_greedy"]),
        "along_sampled": along_table(result["along_sampled"]),
        "decoding_greedy": decoding_table(result["decoding_greedy"]),
        "decoding_sampled": decoding_table(result["decoding_sampled"]),
    }
    text = card(record, model, tables, result["lines"], result["samples"])
    acceptance = own_acceptance(result["decoding_greedy"], result["decoding_sampled"])
    config = json.dumps(replace(model.config, acceptance=acceptance).to_dict(), indent=2) + "\n"
    write_atomically(folder / "README.md", lambda to: to.write_text(text))
    write_atomically(folder / CONFIG_FILE, lambda to: to.write_text(config))


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint.")] = PRETRAINED,
    *,
    sequences: Annotated[int, typer.Option(help="Held-out sequences that drafts are made along.")] = 12,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to decode from.")] = 24,
    length: Annotated[int, typer.Option(help="Bytes to decode after each.")] = 128,
    into_folder: Annotated[bool, typer.Option("--write", help="Into the folder's README.md and config.json.")] = False,
) -> dict[str, Any]:
    """Measure a checkpoint."""
    record = read_record(folder)
    if into_folder and record is None:
        raise typer.BadParameter(f"{folder} has no {RUNS_FILE}, which `fastblt train` writes: the card tells its runs")
    model = load_checkpoint(folder)
    result = measure(model, sequences=sequences, prompts=prompts, length=length)
    if into_folder and record is not None:
        write(folder, record, model, result)
    return result


app = command(main)

if __name__ == "__main__":
    app()
