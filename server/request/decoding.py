"""How a request is decoded: the method and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fastblt.server.request.checks import member, whole, within

#: Bytes that one draft, and one diffusion block, may have at most.
MAX_DRAFT_LENGTH = 32
MAX_BLOCK_SIZE = 32


class DecodingMethod(StrEnum):
    BLT = "blt"
    BLT_D = "blt-d"
    BLT_S = "blt-s"
    BLT_DV = "blt-dv"
    BLT_DSV = "blt-dsv"
    AUTO = "auto"


class Unmasking(StrEnum):
    CONFIDENCE = "confidence"
    ENTROPY = "entropy"
    ONE_STEP = "one_step"


class EntropyRule(StrEnum):
    INCLUSIVE = "inclusive"
    EXCLUSIVE_MAX = "exclusive_max"


@dataclass(frozen=True)
class DecodingParams:
    """How to decode (docs/decoding.md). None leaves a field to the server's default, and that to the method's.

    `confidence_threshold` is a probability, `entropy_bound` is in nats, `block_size` and `draft_length` in bytes.
    """

    method: DecodingMethod | None = None
    block_size: int | None = None
    draft_length: int | None = None
    unmasking: Unmasking | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    entropy_rule: EntropyRule | None = None
    max_steps: int | None = None
    align_blocks: bool | None = None
    paper_accounting: bool | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", DecodingMethod), ("unmasking", Unmasking), ("entropy_rule", EntropyRule)):
            object.__setattr__(self, name, member(getattr(self, name), kind, f"decoding.{name}"))
        whole(self.block_size, 1, MAX_BLOCK_SIZE, "decoding.block_size")
        whole(self.draft_length, 1, MAX_DRAFT_LENGTH, "decoding.draft_length")
        within(self.confidence_threshold, 0.0, 1.0, "decoding.confidence_threshold")
        within(self.entropy_bound, 0.0, 1e6, "decoding.entropy_bound")
        whole(self.max_steps, 1, MAX_BLOCK_SIZE, "decoding.max_steps")


def as_decoding(value: DecodingParams | str) -> DecodingParams:
    """The settings themselves, or those of a method by its name. Raises InvalidRequestError for another name."""
    return DecodingParams(value) if isinstance(value, str) else value  # type: ignore[arg-type]
