"""Names of decoding settings, as the tables of this repository write them, and what a request says to get one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNMASKING = r"(?:a(?P<confidence>[\d.]+)|g(?P<entropy>[\d.]+)|(?P<one_step>1step))"
_NAMES = re.compile(
    r"(?P<plain>auto|blt)|(?P<speculation>blt-s)(?: k(?P<draft>\d+))?"
    rf"|(?P<diffusion>blt-dv?)-(?P<block>\d+) {_UNMASKING}(?P<aligned> aligned)?"
)


def decoding(name: str) -> dict[str, Any]:
    """The `decoding` of a request: of auto, blt, blt-s k8, blt-d-8 a0.7 (confidence), blt-d-8 g1.0 (entropy bound in
    nats), blt-dv-8 1step. Raises ValueError for another name.
    """
    match = _NAMES.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is no setting; write blt, blt-s k8, blt-d-8 a0.7, blt-d-8 g1.0, blt-dv-8 1step or auto"
        )
    if match["plain"]:
        return {"method": match["plain"]}
    if match["speculation"]:
        return {"method": "blt-s"} | ({"draft_length": int(match["draft"])} if match["draft"] else {})
    chosen: dict[str, Any] = {"method": match["diffusion"], "block_size": int(match["block"])}
    if match["one_step"]:
        chosen["unmasking"] = "one_step"
    elif match["confidence"]:
        chosen |= {"unmasking": "confidence", "confidence_threshold": _number(match["confidence"], name)}
    else:
        chosen |= {"unmasking": "entropy", "entropy_bound": _number(match["entropy"], name)}
    return chosen | ({"align_blocks": True} if match["aligned"] else {})


def every_method(block_sizes: Sequence[int]) -> list[str]:
    """One setting of each method that a checkpoint of these block sizes can run, BLT-D at each size."""
    middle = [size for size in (8, *block_sizes) if size in block_sizes][:1]
    return [
        *("blt", "blt-s k8"),
        *(f"blt-dv-{size} 1step" for size in middle),
        *(f"blt-d-{size} a0.7" for size in block_sizes),
    ]


def trade(block_sizes: Sequence[int]) -> list[str]:
    """What the quality table compares: BLT-D at each size and threshold of the paper, and what is without loss."""
    return [
        *("blt", "blt-s k4", "blt-s k8", "blt-s k16"),
        *(f"blt-dv-{size} 1step" for size in block_sizes),
        *(f"blt-d-{size} {rule}" for size in block_sizes for rule in ("a0.5", "a0.7", "g0.8", "g1.0")),
    ]


def family(name: str) -> str:
    """The method, and the block size where quality depends on it."""
    return name.partition(" ")[0] if name.startswith("blt-d-") else re.sub(r"-\d+$", "", name.partition(" ")[0])


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} in the setting {name!r} is no number") from None
