"""What the reference decoders are told, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass, fields

METHODS = ("blt", "blt-d", "blt-s", "blt-dv", "blt-dsv")
UNMASKINGS = ("confidence", "entropy", "one_step")
ENTROPY_RULES = ("inclusive", "exclusive_max")


@dataclass(frozen=True)
class DecodingOptions:
    """A method and its settings, under the names that users type (docs/decoding.md)."""

    method: str = "blt"
    block_size: int = 8
    draft_length: int = 8
    unmasking: str = "confidence"
    confidence_threshold: float = 0.7
    entropy_bound: float = 1.0
    entropy_rule: str = "inclusive"
    max_steps: int | None = None
    align_blocks: bool = False
    paper_accounting: bool = False


@dataclass(frozen=True)
class Nfe:
    """Passes by module. `global_` is the upstream count; `encoder` also counts passes that only feed a drafter."""

    entropy: int = 0
    encoder: int = 0
    global_: int = 0
    decoder: int = 0

    def __add__(self, other: Nfe) -> Nfe:
        return Nfe(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class ReferenceOutput:
    """What a request produced and what it cost.

    `ids` are without EOS. `logprobs` are those of the raw model in the row that gave the byte; `margins` is how far
    each byte was ahead of the next best in its selection. `nfe` counts every pass, the prompt's `prefill` included;
    BLT-D has no prefill of its own, for its first block shares the prompt's pass. `steps` has the denoising steps of
    each block or round. `proposed` bytes of blocks met the decoder's filter (BLT-DSV), which kept the first `passed`
    ones of each. `wasted` counts bytes that were fixed beyond the end of the output.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    finish_reason: str
    nfe: Nfe
    prefill: Nfe
    rounds: int
    drafted: int
    accepted: int
    proposed: int
    passed: int
    wasted: int
    steps: tuple[int, ...]
