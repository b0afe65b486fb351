"""The trade of a model on held-out code: what each setting's next line is worth, beside the bytes a second it makes.

Each prompt is real code up to the end of a line. A completion is right if its first line that is not blank is the real
one, and parses if prompt and line are Python (a line that opens a block is given a body); of a weak model the bytes
before the first wrong one say more. All settings find the prompts in the server's prefix cache, so that speed is that
of decoding; it is taken of `concurrency` requests at a time and, on fewer prompts, of one at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evaluation.completions import bar
from benchmarks.evaluation.endpoint import Completion, Endpoint, Target, together
from benchmarks.evaluation.journal import Journal, Record
from benchmarks.evaluation.next_lines import Cut, cuts
from benchmarks.evaluation.settings import decoding, trade
from benchmarks.humaneval import first_line, parses, parses_strictly
from benchmarks.text_statistics import leading_equal


async def complete(endpoint: Endpoint, setting: str, chosen: Sequence[Cut], length: int) -> list[Completion]:
    """Greedy completions of `length` bytes, as many at a time as the endpoint allows."""
    body = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "decoding": decoding(setting)}
    return await together(endpoint.complete(cut.prompt, **body) for cut in chosen)


async def timed(
    endpoint: Endpoint, setting: str, chosen: Sequence[Cut], length: int
) -> tuple[list[Completion], Record]:
    """The same, with bytes per second of wall time and of the engine's processor time."""
    before, clock = await endpoint.processor_seconds(), time.perf_counter()
    answers = await complete(endpoint, setting, chosen, length)
    seconds, after = time.perf_counter() - clock, await endpoint.processor_seconds()
    made = sum(answer.bytes for answer in answers)
    used = after - before if after is not None and before is not None else None
    return answers, {
        "bytes_per_second": round(made / seconds, 1),
        "bytes_per_processor_second": round(made / used, 1) if used else None,
    }


def judge(chosen: Sequence[Cut], answers: Sequence[Completion]) -> Record:
    """Shares of the completions, and their mean cost a byte."""
    lines = [first_line(answer.text) for answer in answers]
    made = sum(answer.bytes for answer in answers)
    right = [line.strip("\r\n").rstrip() == cut.line for line, cut in zip(lines, chosen, strict=True)]
    costs = [answer.efficiency for answer in answers if answer.efficiency]
    return {
        "prompts": len(chosen),
        "exact_match": sum(right) / len(right),
        "bytes_right": statistics.mean(
            leading_equal(line.strip("\r\n").encode(), cut.line.encode())
            for line, cut in zip(lines, chosen, strict=True)
        ),
        "parses": sum(parses(cut.prompt, line) for cut, line in zip(chosen, lines, strict=True)) / len(right),
        "parses_strictly": sum(parses_strictly(cut.prompt, line) for cut, line in zip(chosen, lines, strict=True))
        / len(right),
        "decoder_nfe_per_byte": sum(cost["nfe"]["decoder"] for cost in costs) / made if costs else None,
        "gb_paper_per_kilobyte": 1000 * sum(cost["gb_paper"] for cost in costs) / made if costs else None,
    }


async def evaluate(
    target: Target, settings: Sequence[str] | None, prompts: int, alone: int, length: int, output: Path
) -> Record:
    """A row of the table for every setting; `alone` prompts are completed one at a time, too.

    Raises EndpointError, JournalError, ValueError.
    """
    chosen = cuts(prompts)
    async with target.open() as endpoint:
        served = await endpoint.served()
        settings = list(settings or trade(served.block_sizes))
        run = {"task": "quality", "model": vars(served), "prompts": prompts, "alone": alone, "length": length}
        journal = Journal(output / "quality.jsonl", run | {"concurrency": target.concurrency})
        if any(setting not in journal.records for setting in settings):
            # Also compiles and allocates whatever the first requests of a server do.
            await complete(endpoint, "blt", chosen, 1)
        async with Endpoint(endpoint.base_url, target.api_key, concurrency=1) as one:
            with bar() as progress:
                for setting in progress.track(settings, description="settings"):
                    if setting in journal.records:
                        continue
                    answers, together = await timed(endpoint, setting, chosen, length)
                    _, apart = await timed(one, setting, chosen[:alone], length)
                    journal.add(setting, judge(chosen, answers) | {"together": together, "alone": apart})
    rows = {setting: journal.records[setting] for setting in settings}
    print(table(rows))
    return {**run, "concurrency": target.concurrency, "settings": rows}


def table(rows: dict[str, Record]) -> str:
    """In Markdown. Bytes a second are of wall time, in brackets of the engine's processor time."""
    lines = [
        "| setting | right lines % | bytes right | parse % | as they stand % | bytes/s, one | bytes/s, together "
        "| decoder NFE a byte | GB (paper) a kB |",
        f"|{'---|' * 9}",
    ]
    for setting, row in rows.items():
        shares = f"{100 * row['exact_match']:.1f} | {row['bytes_right']:.2f} | {100 * row['parses']:.1f}"
        speeds = " | ".join(_speed(row[name]) for name in ("alone", "together"))
        costs = " | ".join(
            "-" if row[name] is None else f"{row[name]:.3f}"
            for name in ("decoder_nfe_per_byte", "gb_paper_per_kilobyte")
        )
        lines.append(f"| {setting} | {shares} | {100 * row['parses_strictly']:.1f} | {speeds} | {costs} |")
    return "\n".join(lines)


def _speed(measured: Record) -> str:
    used = measured["bytes_per_processor_second"]
    return f"{measured['bytes_per_second']:.0f}" + (f" ({used:.0f})" if used else "")
