"""Makes all files of docs/evaluation/ again, for the shipped checkpoint: about 12 minutes on two idle cores.

    python -m fastblt.benchmarks.evaluation.publish                    JSON, charts and their page into docs/evaluation/
    python -m fastblt.benchmarks.evaluation.publish --processor-clock  the same on a machine that has other jobs, too

One server runs all parts: HumanEval by every method, the quality table, diversity, bits per byte of the held-out files,
and a likelihood task in ARC's format (which of four lines of a file comes next) through lm-evaluation-harness, compared
with the model's own log-likelihoods. docs/evaluation/README.md is written from the results.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastblt.benchmarks.command import command
from fastblt.benchmarks.evaluation import bits, charts, diversity, humaneval, likelihood, quality
from fastblt.benchmarks.evaluation.code import evaluate as evaluate_code
from fastblt.benchmarks.evaluation.code import prove
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.evaluation.next_lines import Cut, cuts
from fastblt.benchmarks.evaluation.report import page
from fastblt.benchmarks.evaluation.sandbox import Sandbox
from fastblt.benchmarks.machine import write_json
from fastblt.benchmarks.prompts import held_out_sources
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.settings import PRETRAINED

_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "evaluation"
_LABELS = ("A", "B", "C", "D")
PARTS = ("humaneval", "quality", "diversity", "bits", "likelihood")


def questions(chosen: list[Cut]) -> list[Record]:
    """Questions in ARC's format: a prompt, and as choices its next line and three others, the right one at varying
    places."""
    rows = []
    for number, cut in enumerate(cut for cut in chosen if len(cut.others) == 3):
        right = number % 4
        choices = [*cut.others[:right], cut.line, *cut.others[right:]]
        rows.append(
            {
                "id": str(number),
                "question": cut.prompt[-400:],
                "choices": {"text": choices, "label": list(_LABELS)},
                "answerKey": _LABELS[right],
            }
        )
    return rows


def ask_harness(target: Target, url: str, model: str, count: int, folder: Path) -> Record:
    """The harness's accuracy on `count` questions, and the largest difference of its log-likelihoods to the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "next_lines.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions(cuts(count))))
    name = likelihood.local_task(data, folder)
    result = likelihood.run(url, target, [name], folder, local=True, samples=True)
    samples = result.pop("samples")[name]
    print(likelihood.table(result))
    worst = likelihood.largest_difference(load_checkpoint(Path(model)), samples)
    choices = sum(len(sample["arguments"]) for sample in samples)
    print(f"{choices} log-likelihoods: at most {worst:.1e} nats from the model's own")
    return {**result, "largest_difference": worst, "log_likelihoods": choices}


class Publisher:
    """Makes the parts one by one. `scale` multiplies the number of prompts and samples, and HumanEval's bytes."""

    def __init__(self, url: str, model: str, output: Path, work: Path, scale: float, clock: str) -> None:
        self._target = Target(url, model)
        self._url = url
        self._model = model
        self._output = output
        self._work = work
        self._scale = scale
        self._clock = clock

    def make(self, part: str) -> None:
        """Make one of PARTS: write its JSON, its chart if it has one, and the page, and print its table."""
        began = time.monotonic()
        result = getattr(self, part)()
        made = {"scale": self._scale, "other_jobs": self._clock != "bytes_per_second"}
        write_json(self._output / f"{part}.json", result | {"made": made})
        (self._output / "README.md").write_text(page(self._output))
        print(f"-- {part}: {time.monotonic() - began:.0f} s\n", flush=True)

    def quality(self) -> Record:
        result = asyncio.run(quality.evaluate(self._target, None, self._some(1500), self._some(24), 64, self._work))
        charts.quality(result, self._output / "quality.png", self._clock)
        return result

    def humaneval(self) -> Record:
        with Sandbox() as sandbox:
            problems = humaneval.problems()
            proof = prove("HumanEval", sandbox, problems)
            programs = {problem.name: problem.program for problem in problems}
            jobs = humaneval.jobs(problems, self._some(humaneval.MAX_TOKENS))
            result = asyncio.run(evaluate_code("humaneval", self._target, None, jobs, programs, sandbox, self._work))
        return result | {"own_solutions": proof, "max_tokens": self._some(humaneval.MAX_TOKENS)}

    def diversity(self) -> Record:
        result = asyncio.run(diversity.evaluate(self._target, None, diversity.BOUNDS, self._some(6), 1000, self._work))
        charts.diversity(result, self._output / "diversity.png")
        return result

    def bits(self) -> Record:
        texts = {source.path: source.data for source in held_out_sources()}
        some = dict(list(texts.items())[: self._some(len(texts))] if self._scale < 1 else texts.items())
        return asyncio.run(bits.evaluate(self._target, some, 1024, 1024, self._work))

    def likelihood(self) -> Record:
        target = Target(self._url, self._model, concurrency=4)
        return ask_harness(target, self._url, self._model, self._some(192), self._work / "likelihood")

    def _some(self, count: int) -> int:
        return max(2, round(count * self._scale))


def publish(
    *,
    model: str = str(PRETRAINED),
    output: Annotated[Path, typer.Option(help="Folder of the page.")] = _FOLDER,
    work: Annotated[Path | None, typer.Option(help="Where to keep answers, and go on from. Default: nowhere.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="One part; may be given again.")] = None,
    scale: Annotated[float, typer.Option(help="Times the usual number of prompts, samples, bytes.")] = 1.0,
    processor_clock: Annotated[bool, typer.Option(help="Chart the engine's processor time.")] = False,
) -> dict[str, Any]:
    """Make the parts, and the page after each of them."""
    clock = "bytes_per_processor_second" if processor_clock else "bytes_per_second"
    with tempfile.TemporaryDirectory() as folder, Target(None, model).running() as url:
        publisher = Publisher(url, model, output, work or Path(folder), scale, clock)
        for part in only or PARTS:
            if part not in PARTS:
                raise ValueError(f"{part!r} is no part; there are {', '.join(PARTS)}")
            publisher.make(part)
    return {}


app = command(publish)

if __name__ == "__main__":
    app()
