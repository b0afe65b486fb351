"""Finds grammars whose steps are certain to be cheap: those without recursive rules.

In these, the number of ways to parse a text does not grow with its length. The check reads the grammar's text. Where
that is unclear, the answer is no.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from fastblt.server.request import GrammarKind, StructuredOutput

#: Literals and comments of a grammar in Lark's notation or GBNF. Names and operators inside them do not count.
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"i?|/(?!/)(?:\\.|[^/\\\n])+/[a-z]*|\[(?:\\.|[^\]\\\n])*\]|//.*|#.*')
_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_][\w-]*)(?:\.-?\d+)?[ \t]*(?:::=|:)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][\w-]*")


def is_regular(structured: StructuredOutput) -> bool:
    """Whether the grammar is certainly equivalent to a regular expression."""
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
    """Whether no rule refers to itself, directly or through others, and none uses repetition."""
    bare = _LITERAL.sub(" ", grammar)
    if re.search(r"[*+~{}%<>\"'/\[\]@]", bare):
        return False
    rules = list(_RULE.finditer(bare))
    ends = [rule.start() for rule in rules[1:]] + [len(bare)]
    uses = {rule[1]: set(_NAME.findall(bare[rule.end() : end])) for rule, end in zip(rules, ends, strict=True)}
    return len(uses) == len(rules) and not _has_cycle(uses)


def _comes_back(schema: Any) -> bool:
    """Whether the references in a JSON schema form a cycle. One that is not of the form #/a/b counts as a cycle."""
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
    # The root contains every definition, so its references are no sign of a cycle. A reference to the root is one.
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
