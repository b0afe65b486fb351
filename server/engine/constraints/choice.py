"""Turns a choice into a regular expression with common prefixes factored out.

With a plain list of alternatives, llguidance would follow all of them at every byte.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Nested groups at most, one for each letter where common prefixes branch. llguidance allows 250 levels.
_LEVELS = 60


def one_of(texts: Sequence[str]) -> str:
    """A regular expression, in Rust's syntax, that matches exactly these texts. Common prefixes occur in it once."""
    return _expression(sorted(set(texts)), 0, _LEVELS) if texts else ""


def _expression(texts: list[str], start: int, levels: int) -> str:
    """An expression for the rests of `texts` after `start` letters. The texts are sorted and share these letters."""
    common = start
    while len(texts[0]) > common and texts[0][common] == texts[-1][common]:
        common += 1
    head = _literal(texts[0][start:common])
    ends_here = len(texts[0]) == common
    going_on = texts[1:] if ends_here else texts
    if not going_on:
        return head
    if levels == 0:
        alternatives = [_literal(text[common:]) for text in going_on]
    else:
        alternatives, first = [], 0
        for at in range(1, len(going_on) + 1):
            if at == len(going_on) or going_on[at][common] != going_on[first][common]:
                alternatives.append(_expression(going_on[first:at], common, levels - 1))
                first = at
    return f"{head}(?:{'|'.join(alternatives)}){'?' if ends_here else ''}"


def _literal(text: str) -> str:
    return "".join(letter if letter.isalnum() else f"\\x{{{ord(letter):x}}}" for letter in text)
