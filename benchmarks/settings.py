"""Names of decoding settings, as every table here writes them: `blt-s k8`, `blt-d-8 a0.7`, `blt-dv-8 1step`.

`k8` is a draft of 8 bytes, `-8` a block of 8; `blt-dsv-8 k32` drafts 32 bytes by blocks of 8. `a0.7` unmasks by
confidence (the paper's alpha), `g1.0` by an entropy bound in nats (its gamma), `1step` all at once. `paper` spends
the paper's two upstream passes a round, `aligned` begins blocks where patches do.
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
    """The `decoding` of an HTTP request for a setting. Raises ValueError for a name that is none."""
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
    """A setting for the engine. Raises ValueError for a name that is none."""
    return DecodingParams(**body(name))


#: Lossless settings that stand for their methods in experiments.
LOSSLESS = ("blt", "blt-s k8", "blt-dv-8 1step")


def with_diffusion(block_sizes: Sequence[int]) -> tuple[str, ...]:
    """`LOSSLESS`, and BLT-D where a checkpoint was trained on blocks."""
    return (*LOSSLESS, "blt-d-8 a0.7") if block_sizes else LOSSLESS


def every_method(block_sizes: Sequence[int]) -> list[str]:
    """One setting of each method that a checkpoint of these block sizes can run, BLT-D at each size."""
    middle = [size for size in (8, *block_sizes) if size in block_sizes][:1]
    return [
        *("blt", "blt-s k8"),
        *(f"blt-dv-{size} 1step" for size in middle),
        *(f"blt-dsv-{size} k16" for size in middle),
        *(f"blt-d-{size} a0.7" for size in block_sizes),
    ]


def trade(block_sizes: Sequence[int]) -> list[str]:
    """What the quality table compares: BLT-D at each size and threshold of the paper, and the lossless settings."""
    return [
        *("blt", "blt-s k4", "blt-s k8", "blt-s k16"),
        *(f"blt-dv-{size} 1step" for size in block_sizes),
        *(f"blt-d-{size} {rule}" for size in block_sizes for rule in ("a0.5", "a0.7", "g0.8", "g1.0")),
    ]


def papers(block_sizes: Sequence[int]) -> list[str]:
    """BLT and the settings of the paper's tables 3 to 10 (arXiv 2605.08044).

    Drafting methods come with one upstream pass a round, as the engine spends, and with the paper's two. BLT-D a0.7
    also comes aligned.
    """
    drafts = [f"blt-s k{length}" for length in (4, 8, 16)]
    verified = [f"blt-dv-{size} {rule}" for size in block_sizes for rule in ("a0.3", "g1.5", "g2.0", "1step")]
    blocks = [
        f"blt-d-{size} {rule}" for size in block_sizes for rule in ("a0.5", "a0.7", "g0.8", "g1.0", "a0.7 aligned")
    ]
    return ["blt", *_twice(drafts), *blocks, *_twice(verified)]


def filtered(block_sizes: Sequence[int]) -> list[str]:
    """Settings of BLT-DSV beside the paper's."""
    return [f"blt-dsv-{size} k{length}" for length in (16, 32) for size in block_sizes if size < length // 2]


def chosen(block_sizes: Sequence[int], which: str) -> list[str]:
    """`all` settings of the paper, and BLT-DSV; `headline`: BLT-S, BLT-D a0.7, BLT-DV in one step, BLT-DSV; or those
    whose names contain `which`. BLT is always among them.
    """
    names = [*papers(block_sizes), *filtered(block_sizes)]
    if which == "all":
        return names
    headline = {*(f"blt-d-{size} a0.7" for size in block_sizes), *(f"blt-dv-{size} 1step" for size in block_sizes)}
    headline |= {f"blt-s k{length}" for length in (4, 8, 16)} | set(filtered(block_sizes))
    return [name for name in names if name == "blt" or (name in headline if which == "headline" else which in name)]


def family(name: str) -> str:
    """The method, and the block size where quality depends on it."""
    return name.partition(" ")[0] if name.startswith("blt-d-") else re.sub(r"-\d+$", "", name.partition(" ")[0])


def _twice(names: Sequence[str]) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in ("", " paper")]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} in the setting {name!r} is no number") from None
