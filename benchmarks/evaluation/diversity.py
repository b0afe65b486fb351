"""Diversity against decoder passes, as in arXiv 2605.08044 §6: unconditional samples of BLT-D, from BOS alone.

Blocks are unmasked by several entropy bounds, with top-p, at temperature 1. Diversity is the type-token ratio of words
(split at white space), and the share of different pairs of words and of different runs of four bytes. The cost is
decoder passes per sample. Repetitive text has low entropy and takes fewer steps, so speed at a low top-p comes partly
from repetition.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fastblt.benchmarks import markdown
from fastblt.benchmarks.evaluation.completions import bar
from fastblt.benchmarks.evaluation.endpoint import Endpoint, Target, together
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.markdown import percent
from fastblt.benchmarks.settings import body
from fastblt.benchmarks.text_statistics import distinct4, loops

BOUNDS = (0.5, 0.8, 1.0, 1.2)
TOP_P = (0.8, 0.9, 0.95, 1.0)
_UNCONDITIONAL = [1]

T = TypeVar("T")


def distinct(items: Sequence[T], run: int = 1) -> float:
    """The number of different runs of `run` items divided by the number of all runs, or 0 without any.

    For words and `run` = 1 this is the type-token ratio.
    """
    runs = [tuple(items[at : at + run]) for at in range(len(items) - run + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


async def sample(endpoint: Endpoint, setting: str, top_p: float, samples: int, length: int) -> Record:
    """Means over `samples` samples of `length` bytes with seeds 0, 1, ... Raises EndpointError."""
    answers = await together(
        endpoint.complete(
            _UNCONDITIONAL,
            max_tokens=length,
            temperature=1.0,
            top_p=top_p,
            seed=seed,
            ignore_eos=True,
            decoding=body(setting),
        )
        for seed in range(samples)
    )
    words = [answer.text.split() for answer in answers]
    return {
        "setting": setting,
        "top_p": top_p,
        "type_token_ratio": _mean([distinct(text) for text in words]),
        "distinct_2": _mean([distinct(text, 2) for text in words]),
        "distinct_4_bytes": _mean([distinct4(list(answer.data)) for answer in answers]),
        "loops": _mean([loops(list(answer.data)) for answer in answers]),
        "decoder_nfe": _mean([answer.efficiency["nfe"]["decoder"] for answer in answers]),
        "global_nfe": _mean([answer.efficiency["nfe"]["global"] for answer in answers]),
        "words": _mean([len(text) for text in words]),
        "sample": answers[0].text[:200],
    }


async def sample_all(
    endpoint: Endpoint, journal: Journal, points: Sequence[tuple[str, float]], samples: int, length: int
) -> None:
    """Measure the points that the journal lacks, several at a time. Raises EndpointError."""
    left = [point for point in points if _key(*point) not in journal.records]
    with bar() as progress:
        task = progress.add_task("points", total=len(points), completed=len(points) - len(left))
        # Enough points to keep the endpoint busy, and few enough that each is soon complete and saved.
        turns = asyncio.Semaphore(max(1, 2 * endpoint.concurrency // samples))

        async def one(setting: str, top_p: float) -> None:
            async with turns:
                journal.add(_key(setting, top_p), await sample(endpoint, setting, top_p, samples, length))
            progress.advance(task)

        await together(one(*point) for point in left)


async def evaluate(
    target: Target, sizes: Sequence[int] | None, bounds: Sequence[float], samples: int, length: int, output: Path
) -> Record:
    """A point for BLT, and for BLT-D with every block size and bound, at every top-p.

    Raises ValueError if the model has no diffusion head, EndpointError, JournalError.
    """
    async with target.open() as endpoint:
        served = await endpoint.served()
        sizes = tuple(sizes or served.block_sizes)
        if not sizes:
            raise ValueError(f"{served.name} has no diffusion head: diversity is measured of BLT-D only")
        run = {"task": "diversity", "model": vars(served), "samples": samples, "length": length}
        journal = Journal(output / "diversity.jsonl", run)
        settings = ["blt", *(f"blt-d-{size} g{bound}" for size in sizes for bound in bounds)]
        points = [(setting, top_p) for setting in settings for top_p in TOP_P]
        await sample_all(endpoint, journal, points, samples, length)
    rows = [journal.records[_key(*point)] for point in points]
    print(table(rows))
    return {**run, "points": rows}


def table(rows: Sequence[Record]) -> str:
    """The points as a Markdown table."""
    ratios = ("type_token_ratio", "distinct_2", "distinct_4_bytes")
    cells = [
        [
            row["setting"],
            str(row["top_p"]),
            f"{row['decoder_nfe']:.0f}",
            *(f"{row[ratio]:.3f}" for ratio in ratios),
            percent(row["loops"]),
        ]
        for row in rows
    ]
    columns = ("setting", "top-p", "decoder NFE", "type-token ratio", "distinct-2", "4 bytes", "loops %")
    return markdown.table(columns, cells)


def _key(setting: str, top_p: float) -> str:
    return f"{setting} p{top_p}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
