"""Names of decoding settings, as all tables write them: `blt-s k8`, `blt-d-8 a0.7`, `blt-dv-8 1step`.

`k8` is a draft of 8 bytes and `-8` a block of 8; `blt-dsv-8 k32` drafts 32 bytes in blocks of 8. `a0.7` unmasks by
confidence (the paper's alpha), `g1.0` by an entropy bound in nats (its gamma), `1step` all positions at once. With
`paper` a round costs two upstream passes, as in the paper. With `aligned` blocks begin where patches do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastblt.server.request import DecodingParams

_UNMASKING = r"(?:a(?P<confidence>[\d.]+)|g(?P<entropy>[\d.]+)|(?P<one_step>1step))"
_NAMES = re.compile(
    r"(?:(?P<plain>auto|blt)|(?P<speculation>blt-s)(?: k(?P<draft>\d+))?"
    rf"|(?P<diffusion>blt-(?:d|dv|dsv))-(?P<block>\d+)(?: k(?P<length>\d+))?(?: {_UNMASKING})?(?P<aligned> aligned)?)"
    r"(?P<paper> paper)?"
)


def body(name: str) -> dict[str, Any]:
    """The field `decoding` of an HTTP request for a setting. Raises ValueError for an unknown name."""
    match = _NAMES.fullmatch(name)
    filtered = match is not None and match["diffusion"] == "blt-dsv"
    rule = match is not None and (match["one_step"] or match["confidence"] or match["entropy"])
    if (
        match is None
        or (match["plain"] and match["paper"])
        or (match["diffusion"] and not (rule or filtered))
        or (match["length"] is not None) != filtered
    ):
        raise ValueError(
            f"{name!r} is no setting; write blt, blt-s k8, blt-d-8 a0.7, blt-d-8 g1.0, blt-dv-8 1step, blt-dsv-8 k32 "
            "or auto"
        )
    chosen: dict[str, Any] = {"method": match["plain"] or match["speculation"] or match["diffusion"]}
    if length := match["draft"] or match["length"]:
        chosen["draft_length"] = int(length)
    if match["diffusion"]:
        chosen["block_size"] = int(match["block"])
    if match["one_step"]:
        chosen["unmasking"] = "one_step"
    elif match["confidence"]:
        chosen |= {"unmasking": "confidence", "confidence_threshold": _number(match["confidence"], name)}
    elif match["entropy"]:
        chosen |= {"unmasking": "entropy", "entropy_bound": _number(match["entropy"], name)}
    flags = {"align_blocks": match["aligned"], "paper_accounting": match["paper"]}
    return chosen | {flag: True for flag, given in flags.items() if given}


def decoding(name: str) -> DecodingParams:
    """A setting for the engine. Raises ValueError for an unknown name."""
    return DecodingParams(**body(name))


#: One lossless setting for each of BLT, BLT-S, BLT-DV and BLT-DSV, for experiments.
LOSSLESS = ("blt", "blt-s k8", "blt-dv-8 1step", "blt-dsv-8 k32")


def with_diffusion(block_sizes: Sequence[int]) -> tuple[str, ...]:
    """`LOSSLESS`, and BLT-D if the checkpoint was trained on blocks."""
    return (*LOSSLESS, "blt-d-8 a0.7") if block_sizes else LOSSLESS


def every_method(block_sizes: Sequence[int]) -> list[str]:
    """One setting of each method that a checkpoint with these block sizes can run, BLT-D with each size."""
    middle = [size for size in (8, *block_sizes) if size in block_sizes][:1]
    return [
        *("blt", "blt-s k8"),
        *(f"blt-dv-{size} 1step" for size in middle),
        *(f"blt-dsv-{size} k16" for size in middle),
        *(f"blt-d-{size} a0.7" for size in block_sizes),
    ]


def trade(block_sizes: Sequence[int]) -> list[str]:
    """Settings of the quality table: BLT-D with each block size and four of the paper's rules; BLT, and the others
    that give its bytes, one of each."""
    return [
        *("blt", "blt-s k16"),
        *(f"blt-dv-{size} 1step" for size in block_sizes[:1]),
        *(f"blt-d-{size} {rule}" for size in block_sizes for rule in ("a0.5", "a0.7", "g0.8", "g1.0")),
    ]


def papers(block_sizes: Sequence[int]) -> list[str]:
    """BLT and the settings of the paper's tables 3 to 10 (arXiv 2605.08044).

    Drafting methods are listed twice: with one upstream pass a round, as in this engine, and with the paper's two.
    BLT-D a0.7 is also listed aligned.
    """
    drafts = [f"blt-s k{length}" for length in (4, 8, 16)]
    verified = [f"blt-dv-{size} {rule}" for size in block_sizes for rule in ("a0.3", "g1.5", "g2.0", "1step")]
    blocks = [
        f"blt-d-{size} {rule}" for size in block_sizes for rule in ("a0.5", "a0.7", "g0.8", "g1.0", "a0.7 aligned")
    ]
    return ["blt", *_twice(drafts), *blocks, *_twice(verified)]


def longer(block_sizes: Sequence[int]) -> list[str]:
    """Settings that the paper does not have: BLT-DSV, and the drafts of BLT-S that are as long as its longest."""
    return ["blt-s k32"] + [
        f"blt-dsv-{size} k{length}" for length in (16, 32) for size in block_sizes if size < length // 2
    ]


def chosen(block_sizes: Sequence[int], which: str) -> list[str]:
    """The settings that `which` selects. `all`: those of the paper, and BLT-DSV. `headline`: BLT-S, BLT-D a0.7, BLT-DV
    in one step, BLT-DSV. Any other text: those whose names contain it. BLT is always included.
    """
    names = [*papers(block_sizes), *longer(block_sizes)]
    if which == "all":
        return names
    headline = {*(f"blt-d-{size} a0.7" for size in block_sizes), *(f"blt-dv-{size} 1step" for size in block_sizes)}
    headline |= {f"blt-s k{length}" for length in (4, 8, 16)} | set(longer(block_sizes))
    return [name for name in names if name == "blt" or (name in headline if which == "headline" else which in name)]


def family(name: str) -> str:
    """The method of a setting; for BLT-D with its block size, on which the quality depends."""
    return name.partition(" ")[0] if name.startswith("blt-d-") else re.sub(r"-\d+$", "", name.partition(" ")[0])


def _twice(names: Sequence[str]) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in ("", " paper")]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} in the setting {name!r} is no number") from None
