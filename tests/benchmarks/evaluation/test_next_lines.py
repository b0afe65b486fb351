from __future__ import annotations

import pytest

from fastblt.benchmarks.evaluation.next_lines import first_line, parses, parses_strictly


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("    return 1\n    more", "    return 1"),
        ("\n  \n    x = 1\n", "\n  \n    x = 1"),
        ("    no end", "    no end"),
        ("", ""),
        (" \n\n", ""),
    ],
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text).strip() == line.strip()
    assert text.startswith(first_line(text))
    assert first_line(text) == line or not line


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("    return 2 * x\n", True),
        ("\n    for y in x:", True),
        ("    try:", True),
        ("    # twice", True),
        ("    return 2 *", False),
        ("    >>> double(2)", False),
        ("        return x", False),
        ("", False),
        ("\n\n", False),
    ],
)
def test_parses(line: str, fits: bool) -> None:
    assert parses('def double(x):\n    """Twice x."""\n', line) is fits


def test_strict_parsing() -> None:
    prompt = 'def f(x):\n    """Doc."""\n'
    assert parses_strictly(prompt, "    return x")
    assert not parses_strictly(prompt, "    for y in x:")
    assert not parses_strictly(prompt, "    >>> f(1)")
    assert not parses_strictly(prompt, "\n   ")
