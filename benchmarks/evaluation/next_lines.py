"""Next lines: held-out code that is cut at the end of a line, and checks of the line that a model writes next.

The shipped model is too small to solve problems. It can be judged by whether it writes Python.
"""

from __future__ import annotations

import ast
import random
import warnings
from dataclasses import dataclass

from fastblt.benchmarks.prompts import held_out_sources


@dataclass(frozen=True)
class Cut:
    """A piece of a file that begins with a statement on the left margin, and the next line, without its line end.

    `others` are up to three other lines of the same file, of similar indentation.
    """

    prompt: str
    line: str
    others: tuple[str, ...]


def cuts(count: int, shortest: int = 256, longest: int = 1500, seed: int = 0) -> list[Cut]:
    """`count` cuts, spread over all held-out files. They are always the same for one release of Python.

    Prompts have `shortest` to `longest` bytes, and cuts in a file are at least `shortest` bytes apart. Each prompt with
    its own next line parses. Raises ValueError if the files have too few places.
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
        # The last statement from which the prompt is long enough.
        begin = max((start for start in starts if offsets[at] - offsets[start] >= shortest), default=None)
        if begin is None or offsets[at] - offsets[begin] > longest or rng.random() < 0.7:
            continue
        prompt = "".join(lines[begin:at])
        if parses(prompt, line):
            found.append(Cut(prompt, line, _others(lines, line, rng)))
            # Lines that are close together are too similar.
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
    """A text up to and including its first line that is not blank, without the line end."""
    at = 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.strip():
            break
    return text[:at].rstrip("\r\n")


def parses(prompt: str, line: str) -> bool:
    """Whether prompt and line together are valid Python. A line that opens a block is given a body."""
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
    """Whether prompt and line together are valid Python without any addition."""
    if not line.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(prompt + line)
    except (SyntaxError, ValueError):
        return False
    return True
