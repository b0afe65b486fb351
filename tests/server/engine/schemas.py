"""Random JSON schemas that the compiler takes and random bytes can satisfy in a few hundred bytes."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("a", "id", "naïve", "日本", 'q"uote', "back\\slash", "new\nline", "🎉")
_PATTERNS = ("^[0-9]{4}-[0-9]{2}$", "^(yes|no)$", "^[a-z]{1,8}@x\\.org$", "^é{2,3}$")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const", "anyOf"]
    if depth:
        kinds += ["object", "object", "array"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 12)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(_PATTERNS)}
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        case "number":
            return {"type": "number", "minimum": -10, "exclusiveMaximum": 10.5}
        case "enum":
            return {"enum": rng.sample([1, -2.5, "x", None, True, [1, 2], {"k": "v"}, *_NAMES], rng.randint(1, 5))}
        case "const":
            return {"const": rng.choice(_NAMES)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, 0), random_schema(rng, 0)]}
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth - 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 3),
            }
        case "object":
            names = rng.sample(_NAMES, rng.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
        case kind:
            return {"type": kind}
