"""Which grammars surely have small steps: those whose rules do not come back to themselves.

Nothing in them can be read in more ways the longer the text gets. It is told from the text, and where that is not clear
the answer is no.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from fastblt.server.request import GrammarKind, StructuredOutput

#: Literals and comments of a grammar in Lark's notation or GBNF; what stands in them is no name and no operator.
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"i?|/(?!/)(?:\\.|[^/\\\n])+/[a-z]*|\[(?:\\.|[^\]\\\n])*\]|//.*|#.*')
_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_][\w-]*)(?:\.-?\d+)?[ \t]*(?:::=|:)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][\w-]*")


def is_regular(structured: StructuredOutput) -> bool:
    """Whether it is a regular expression in other words, as far as can be told."""
    match structured.kind:
        case GrammarKind.REGEX | GrammarKind.CHOICE:
            return True
        case GrammarKind.JSON_SCHEMA:
            try:
                return not _comes_back(json.loads(structured.text))
            except (ValueError, RecursionError):
                return False
        case GrammarKind.GRAMMAR:
            return _is_flat(structured.text)


def _is_flat(grammar: str) -> bool:
    """Whether no rule leads to itself, be it by repetition."""
    bare = _LITERAL.sub(" ", grammar)
    if re.search(r"[*+~{}%<>\"'/\[\]@]", bare):
        return False
    rules = list(_RULE.finditer(bare))
    ends = [rule.start() for rule in rules[1:]] + [len(bare)]
    uses = {rule[1]: set(_NAME.findall(bare[rule.end() : end])) for rule, end in zip(rules, ends, strict=True)}
    return len(uses) == len(rules) and not _has_cycle(uses)


def _comes_back(schema: Any) -> bool:
    """Whether following references leads to one of them again. References are of the form #/a/b."""
    uses: dict[str, set[str]] = {"#": set(_references(schema))}
    new = list(uses["#"])
    while new:
        reference = new.pop()
        if reference in uses:
            continue
        target = schema
        if not reference.startswith("#"):
            return True
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or step not in target:
                return True
            target = target[step]
        uses[reference] = set(_references(target))
        new += uses[reference]
    # What the root has, it has for the sake of its own references: only these tell of a cycle.
    del uses["#"]
    return "#" in set().union(*uses.values(), _references(schema)) or _has_cycle(uses)


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        found = [value for key, value in schema.items() if key in ("$ref", "$dynamicRef") and isinstance(value, str)]
        return found + [reference for value in schema.values() for reference in _references(value)]
    if isinstance(schema, list):
        return [reference for value in schema for reference in _references(value)]
    return []


def _has_cycle(uses: dict[str, set[str]]) -> bool:
    left = dict(uses)
    while left:
        ends = [name for name, used in left.items() if not used & left.keys()]
        if not ends:
            return True
        for name in ends:
            del left[name]
    return False
