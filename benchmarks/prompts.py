"""Prompts for benchmarks: Python that every machine has, cut to any length."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from fastblt.models.vocabulary import encode, with_bos


def library_text() -> bytes:
    """Source of a few standard library modules, in a fixed order."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = (
        "argparse.py",
        "ast.py",
        "calendar.py",
        "csv.py",
        "dataclasses.py",
        "datetime.py",
        "difflib.py",
        "inspect.py",
    )
    return b"\n".join((folder / name).read_bytes() for name in names)


def prompt_ids(count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` ids each, BOS included, taken from different places."""
    text = library_text()
    stride = max(1, (len(text) - length) // count)
    return [with_bos(encode(text[i * stride : i * stride + length - 1])) for i in range(count)]
