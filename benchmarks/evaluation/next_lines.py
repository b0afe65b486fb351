"""Next lines: held-out code that is cut at the end of a line, and checks of the line that a model writes next.

The shipped model is too small to solve problems. It can be judged by whether it writes Python.
"""

from __future__ import annotations

import ast
import random
import warnings
from dataclasses import dataclass

from fastblt.benchmarks.prompts import held_out_sources

#: Bytes between two cuts of a file.
_APART = 32


@dataclass(frozen=True)
class Cut:
    """A piece of a file from the beginning of a statement, class or function on, and the next line, without its line
    end. Both are brought to the left margin.

    `others` are up to three other lines of the same file, of similar indentation.
    """

    prompt: str
    line: str
    others: tuple[str, ...]


def cuts(count: int, shortest: int = 256, longest: int = 1500, seed: int = 0) -> list[Cut]:
    """`count` cuts, spread over all held-out files. They are always the same for one release of Python.

    Prompts have `shortest` to `longest` bytes. Each prompt with its own next line parses. Raises ValueError if the
    files have too few places.
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
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    # Where a prompt can begin, and the line before which it must end.
    begins = [(node.lineno - 1, len(lines), 0) for node in tree.body]
    begins += [
        (node.lineno - 1, node.end_lineno or 0, node.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.col_offset
    ]
    at_margin = {0: lines}
    found, free = [], 0
    for at in range(1, len(lines)):
        if not lines[at].strip() or lines[at].lstrip().startswith("#") or offsets[at] < free:
            continue
        fits = [
            (begin, margin)
            for begin, end, margin in begins
            if begin < at < end and shortest <= offsets[at] - offsets[begin] <= longest
        ]
        if not fits:
            continue
        begin, margin = max(fits)
        if margin not in at_margin:
            at_margin[margin] = [_dedented(line, margin) for line in lines]
        moved = at_margin[margin]
        prompt, line = "".join(moved[begin:at]), moved[at].rstrip()
        if len(prompt.encode()) >= shortest and parses(prompt, line):
            found.append(Cut(prompt, line, _others(moved, line, rng)))
            # The same line is never asked for twice, and neighbors are too similar.
            free = offsets[at] + _APART
    rng.shuffle(found)
    return found


def _dedented(line: str, margin: int) -> str:
    """A line with `margin` blanks less, or as many as it has: a blank line or one within a string may have fewer."""
    return line[min(margin, len(line) - len(line.lstrip(" \t"))) :]


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
