"""Next lines: held-out code cut at the end of a line, with the line that really follows; and what a line is worth.

So small a model as the shipped one solves no problems; what it must do is write Python.
"""

from __future__ import annotations

import ast
import random
import warnings
from dataclasses import dataclass

from fastblt.benchmarks.prompts import held_out_sources


@dataclass(frozen=True)
class Cut:
    """A piece of a file, from a statement on the left margin on, and the line that follows, without its end."""

    prompt: str
    line: str
    others: tuple[str, ...]


def cuts(count: int, shortest: int = 256, longest: int = 1500, seed: int = 0) -> list[Cut]:
    """`count` cuts from as many held-out files as there are, spread over each: always the same ones for a release of
    Python. Prompts have `shortest` to `longest` bytes, and the former lie between two cuts. With its own next line each
    prompt parses. Raises ValueError where the files have too few places.

    `others` are up to three other lines of the same file, indented alike where there are such.
    """
    rng = random.Random(seed)
    files = [found for source in held_out_sources() if (found := _places(source.data, shortest, longest, rng))]
    rng.shuffle(files)
    chosen: list[Cut] = []
    for depth in range(max(map(len, files), default=0)):
        chosen += [file[depth] for file in files if depth < len(file)]
        if len(chosen) >= count:
            return chosen[:count]
    raise ValueError(f"the held-out files have {len(chosen)} places for a cut, not {count}; ask for fewer")


def _places(data: bytes, shortest: int, longest: int, rng: random.Random) -> list[Cut]:
    try:
        text = data.decode()
        starts = [node.lineno - 1 for node in ast.parse(text).body]
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    found, free = [], 0
    for at in range(1, len(lines)):
        line = lines[at].rstrip()
        if not line.strip() or line.lstrip().startswith("#") or offsets[at] < free:
            continue
        # The latest statement that gives a prompt of the shortest length, or more.
        begin = max((start for start in starts if offsets[at] - offsets[start] >= shortest), default=None)
        if begin is None or offsets[at] - offsets[begin] > longest or rng.random() < 0.7:
            continue
        prompt = "".join(lines[begin:at])
        if parses(prompt, line):
            found.append(Cut(prompt, line, _others(lines, line, rng)))
            # Lines that stand together are too much alike.
            free = offsets[at] + shortest
    rng.shuffle(found)
    return found


def _others(lines: list[str], line: str, rng: random.Random) -> tuple[str, ...]:
    different = sorted({other.rstrip() for other in lines if other.strip()} - {line})
    rng.shuffle(different)
    indent = len(line) - len(line.lstrip())
    different.sort(key=lambda other: abs(len(other) - len(other.lstrip()) - indent))
    return tuple(different[:3])


def first_line(text: str) -> str:
    """A text up to and including its first line that is not blank, without that line's end."""
    at = 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.strip():
            break
    return text[:at].rstrip("\r\n")


def parses(prompt: str, line: str) -> bool:
    """Whether the prompt and the line after it are a program; a line that opens a block is given a body."""
    if not line.strip():
        return False
    indent = line[: len(line) - len(line.lstrip())]
    for text in (
        prompt + line,
        f"{prompt}{line}\n{indent}    pass\n",
        f"{prompt}{line}\n{indent}    pass\n{indent}except: pass\n",
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        return True
    return False


def parses_strictly(prompt: str, line: str) -> bool:
    """Whether the prompt and the line are a program as they stand."""
    if not line.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(prompt + line)
    except (SyntaxError, ValueError):
        return False
    return True
