"""Whether a completion's first line is Python after its prompt.

So small a model as the shipped one solves no problems; what it must do is write Python.
"""

from __future__ import annotations

import ast
import warnings


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
