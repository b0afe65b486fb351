"""Reads a Dockerfile: the part of the format that ours uses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `flags` are its options (`--from=build`), `rest` is the text after them."""

    name: str
    flags: dict[str, str]
    rest: str

    def words(self) -> list[str]:
        """The words of `rest`, which may be a JSON list."""
        if self.rest.startswith("["):
            return [str(word) for word in json.loads(self.rest)]
        return shlex.split(self.rest)


def read(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, in order. Raises ValueError for a line that is not an instruction."""
    joined = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or (not joined and not line.strip()):
            continue
        joined += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        yield _instruction(" ".join(joined.split(" ")).strip())
        joined = ""


def expand(text: str, values: dict[str, str]) -> str:
    """Replace `$NAME` and `${NAME}` by their values, or by nothing if there is none."""
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[2], ""), text)


def _instruction(line: str) -> Instruction:
    match = re.fullmatch(r"([A-Z]+)\s+(.*)", line, re.DOTALL)
    if not match:
        raise ValueError(f"{line!r} is no instruction")
    name, rest = match[1], match[2].strip()
    flags: dict[str, str] = {}
    while flag := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags[flag[1]] = flag[2]
        rest = rest[flag.end() :]
    return Instruction(name, flags, rest)
