"""Quality against speed on held-out code: how good each setting's next line is, and its bytes per second.

Each prompt is real code up to the end of a line. A completion is right if its first line that is not blank equals the
real one. It parses if prompt and line are valid Python (a line that opens a block is given a body). For a weak model
the number of bytes before the first wrong one says more. What a setting keeps of BLT's lines that parse, and what
another checkpoint does at the same places, are given with 95 % intervals (`evaluation.paired`).

Speed is measured with groups of `concurrency` requests and, on fewer prompts, with one request at a time. All settings
run on a group, in a different order each time, before the next group begins, so that a slow period of the machine
affects all of them. The group's prompts are in the server's prefix cache, so the speed is that of decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from fastblt.benchmarks import markdown
from fastblt.benchmarks.evaluation import paired
from fastblt.benchmarks.evaluation.completions import bar
from fastblt.benchmarks.evaluation.endpoint import Completion, Endpoint, Target, together
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.evaluation.next_lines import Cut, cuts, first_line, parses, parses_strictly
from fastblt.benchmarks.markdown import percent
from fastblt.benchmarks.settings import body, trade
from fastblt.benchmarks.text_statistics import leading_equal

#: Requests in a group that is completed one at a time.
_ALONE = 8


async def complete(endpoint: Endpoint, setting: str, chosen: Sequence[Cut], length: int) -> list[Completion]:
    """Greedy completions of `length` bytes, as many at a time as the endpoint allows."""
    fields = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "decoding": body(setting)}
    return await together(endpoint.complete(cut.prompt, **fields) for cut in chosen)


async def timed(endpoint: Endpoint, setting: str, chosen: Sequence[Cut], length: int) -> Record:
    """The same, with seconds of wall time and of the engine's processor time, and what `judge` needs of each answer."""
    before, clock = await endpoint.processor_seconds(), time.perf_counter()
    answers = await complete(endpoint, setting, chosen, length)
    seconds, after = time.perf_counter() - clock, await endpoint.processor_seconds()
    return {
        "seconds": seconds,
        "processor_seconds": after - before if after is not None and before is not None else None,
        "answers": [
            {
                "text": answer.text,
                "bytes": answer.bytes,
                "decoder_nfe": answer.efficiency["nfe"]["decoder"] if answer.efficiency else None,
                "gb_paper": answer.efficiency["gb_paper"] if answer.efficiency else None,
            }
            for answer in answers
        ],
    }


def speed(groups: Sequence[Record]) -> Record:
    """Bytes per second of wall time and of processor time, over all groups of a setting."""
    made = sum(answer["bytes"] for group in groups for answer in group["answers"])
    used = [group["processor_seconds"] for group in groups]
    # A server without the metric of processor time gives None for all groups.
    processor = None if None in used else sum(used)
    return {
        "bytes_per_second": round(made / sum(group["seconds"] for group in groups), 1),
        "bytes_per_processor_second": round(made / processor, 1) if processor else None,
    }


def judge(chosen: Sequence[Cut], answers: Sequence[Record]) -> Record:
    """Quality of the completions, as shares and means, and their mean cost per byte."""
    lines = [first_line(answer["text"]) for answer in answers]
    made = sum(answer["bytes"] for answer in answers)
    right = [line.strip("\r\n").rstrip() == cut.line for line, cut in zip(lines, chosen, strict=True)]
    parsed = [parses(cut.prompt, line) for cut, line in zip(chosen, lines, strict=True)]
    told = all(answer["decoder_nfe"] is not None for answer in answers)
    return {
        "prompts": len(chosen),
        "exact_match": sum(right) / len(right),
        "bytes_right": statistics.mean(
            leading_equal(line.strip("\r\n").encode(), cut.line.encode())
            for line, cut in zip(lines, chosen, strict=True)
        ),
        "parses": sum(parsed) / len(right),
        # For every place, in order.
        "parsed": "".join(str(int(one)) for one in parsed),
        "parses_strictly": sum(parses_strictly(cut.prompt, line) for cut, line in zip(chosen, lines, strict=True))
        / len(right),
        "decoder_nfe_per_byte": sum(answer["decoder_nfe"] for answer in answers) / made if told else None,
        "gb_paper_per_kilobyte": 1000 * sum(answer["gb_paper"] for answer in answers) / made if told else None,
    }


async def evaluate(
    target: Target, settings: Sequence[str] | None, prompts: int, alone: int, length: int, output: Path
) -> Record:
    """A row of the table for every setting. The first `alone` prompts are also completed one at a time.

    Raises EndpointError, JournalError, and ValueError if there are too few held-out prompts.
    """
    chosen = cuts(prompts)
    async with target.open() as endpoint:
        served = await endpoint.served()
        settings = list(settings or trade(served.block_sizes))
        run = {"task": "quality", "model": vars(served), "prompts": prompts, "alone": alone, "length": length}
        journal = Journal(output / "quality.jsonl", run | {"concurrency": target.concurrency})
        async with Endpoint(endpoint.base_url, target.api_key, concurrency=1) as one:
            groups = [("together", endpoint, group) for group in _groups(chosen, target.concurrency)]
            groups += [("alone", one, group) for group in _groups(chosen[:alone], _ALONE)]
            with bar() as progress:
                task = progress.add_task("groups", total=len(groups))
                for number, (where, asked, group) in enumerate(groups):
                    turns = [settings[(number + at) % len(settings)] for at in range(len(settings))]
                    due = [setting for setting in turns if _key(setting, where, number) not in journal.records]
                    if due:
                        # A warm-up: afterwards the prompts are in the prefix cache.
                        await complete(endpoint, "blt", group, 1)
                    for setting in due:
                        journal.add(_key(setting, where, number), await timed(asked, setting, group, length))
                    progress.advance(task)
    rows: dict[str, Record] = {}
    for setting in settings:
        found: dict[str, list[Record]] = {"together": [], "alone": []}
        for number, (where, _, _) in enumerate(groups):
            found[where].append(journal.records[_key(setting, where, number)])
        answers = [answer for group in found["together"] for answer in group["answers"]]
        rows[setting] = judge(chosen, answers) | {where: speed(records) for where, records in found.items()}
    if "blt" in rows:
        for row in rows.values():
            row["kept"] = paired.share(_flags(row), _flags(rows["blt"]))
    print(table(rows))
    return {**run, "concurrency": target.concurrency, "settings": rows}


def compare(result: Record, other: Record) -> str:
    """A Markdown table of two results of `evaluate` for the same places, such as of two checkpoints.

    Raises ValueError if they have no setting in common, or other places.
    """
    common = [setting for setting in result["settings"] if setting in other["settings"]]
    if not common or any(result[name] != other[name] for name in ("prompts", "length")):
        raise ValueError("the other result has other places or bytes, or none of these settings")
    cells = []
    for setting in common:
        ours, theirs = _flags(result["settings"][setting]), _flags(other["settings"][setting])
        found = {name: 100 * value for name, value in paired.difference(ours, theirs).items()}
        interval = f"{found['value']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"
        cells.append([setting, *(percent(sum(flags) / len(flags), 1) for flags in (ours, theirs)), interval])
    return markdown.table(("setting", "parse %", "of the other", "difference, points"), cells)


def _flags(row: Record) -> list[bool]:
    return [one == "1" for one in row["parsed"]]


def _groups(chosen: Sequence[Cut], size: int) -> list[Sequence[Cut]]:
    return [chosen[at : at + size] for at in range(0, len(chosen), size)]


def _key(setting: str, where: str, number: int) -> str:
    return f"{setting}, {where} {number}"


def table(rows: dict[str, Record]) -> str:
    """A Markdown table. Bytes a second are of wall time; in brackets, of the engine's processor time."""
    columns = ("setting", "right lines %", "bytes right", "parse %", "of BLT's %", "as they stand %", "bytes/s, one")
    cells = []
    for setting, row in rows.items():
        shares = (percent(row["exact_match"], 1), f"{row['bytes_right']:.2f}", percent(row["parses"], 1))
        speeds = (_speed(row[name]) for name in ("alone", "together"))
        costs = (row[name] for name in ("decoder_nfe_per_byte", "gb_paper_per_kilobyte"))
        told = ("-" if cost is None else f"{cost:.3f}" for cost in costs)
        kept = (_share(row["kept"]) if "kept" in row else "-", percent(row["parses_strictly"], 1))
        cells.append([setting, *shares, *kept, *speeds, *told])
    return markdown.table((*columns, "bytes/s, together", "decoder NFE a byte", "GB (paper) a kB"), cells)


def _share(kept: Record) -> str:
    value, low, high = (100 * kept[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _speed(measured: Record) -> str:
    used = measured["bytes_per_processor_second"]
    return f"{measured['bytes_per_second']:.0f}" + (f" ({used:.0f})" if used else "")
