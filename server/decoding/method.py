"""What a decoding method is: it plans the rows a request wants next, and takes what they gave. It knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastblt.kernels.unmasking import ONE_STEP


@dataclass(frozen=True)
class Unmask:
    """One denoising step: which masked positions of a block it fills (arXiv 2605.08044 §3.1.2; design §2.7)."""

    #: CONFIDENCE, ENTROPY, EXCLUSIVE_MAX or ONE_STEP of `kernels.unmasking`.
    rule: int
    #: A probability for CONFIDENCE, nats for the entropy rules; ONE_STEP has none.
    bound: float
    #: Steps that the block may still take, this one included: the last fills everything. None: no limit.
    left: int | None = None

    @property
    def last_step(self) -> bool:
        return self.left == 1

    @property
    def fills(self) -> bool:
        """Whether the step leaves nothing masked, whatever the model says."""
        return self.last_step or self.rule == ONE_STEP


@dataclass(slots=True)
class Plan:
    """Decoder rows that one request wants in the next pass. They are taken whole or not at all.

    Causal rows come first, then the rows of a block. Where a plan has both, the byte of the last causal row is the
    block's first byte.

    Some plans may go on by themselves, several passes in one call, as long as the host has nothing to decide (`repeat`,
    `next_length`). Whoever runs the plan may stop it after any row or step.
    """

    #: Position of the first causal row.
    start: int
    #: Number of causal rows: positions [start, start + causal), over known or drafted bytes.
    causal: int
    #: Whether the rows first pass entropy model and encoder and, where patches close, the global transformer. They then
    #: read each its own latent and stay computed.
    upstream: bool = True
    #: Whether the bytes given are a draft: all rows read the newest latent, and none stays computed.
    draft: bool = False
    #: How many causal rows, the last ones, each give a byte. More than one verify the draft that they stand on.
    samples: int = 0
    #: The block's ids, MASK_ID where it is to be filled. Its rows are bidirectional and read the newest latent.
    block_ids: Sequence[int] = ()
    #: Whether the newest latent is that of the open patch, which is closed for this pass only.
    provisional: bool = False
    #: How the block is filled; for a verification, how the block drafted behind it is.
    unmask: Unmask | None = None
    #: The next plan needs the entropies of all rows below this position, over bytes that this plan gives: the entropy
    #: model may run in the same pass, if nothing is left masked. 0: not known to be needed.
    scan_to: int = 0
    #: The plan to take instead where the patch is still open behind the causal rows.
    if_open: Plan | None = None
    #: A plan of one row may go on for up to so many rows, each over the byte before: a draft always, other rows until
    #: a byte closes a patch or ends the text. A plan with a block may go on for so many steps, until nothing is masked.
    repeat: int = 1
    #: A verification may go on with the next draft of up to so many bytes, from the byte that it gives: a block where
    #: there is `unmask`, else single rows. `repeat` then counts 1 and the draft's passes, and its outcome comes with
    #: the plan NEXT_DRAFT.
    next_length: int = 0
    #: That draft is made of blocks of up to so many bytes, which the decoder filters (BLT-DSV), in one call, which may
    #: end it early. A draft whose block is the first of such a draft of `next_length` bytes may be run as all of it.
    next_block: int = 0
    #: Rows in all, and the position behind the last causal one: every pass asks several times.
    rows: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.causal + len(self.block_ids)
        self.end = self.start + self.causal

    def draft_next(self, length: int, unmask: Unmask | None, passes: int, block: int = 0) -> None:
        """Let a verification go on with the next draft: up to `length` bytes in up to `passes` passes; of blocks of up
        to `block` bytes if it is to be filtered."""
        self.next_length, self.unmask, self.repeat, self.next_block = length, unmask, 1 + passes, block

    def stop_after(self, repeat: int) -> None:
        """Let the plan go on by itself for no more than `repeat` rows or steps."""
        if repeat < self.repeat:
            self.repeat = repeat
            if self.next_block and not self.block_ids:
                # A verification alone.
                self.repeat = 1
            if repeat == 1 or self.next_block:
                self.next_length = self.next_block = 0
            if self.draft and not self.block_ids:
                # Its last byte, which `scan_to` counts on, may then be missing.
                self.scan_to = 0


#: The plan of a draft that was made in the verification's own call (`Plan.next_length`): nobody asked the method for
#: it.
NEXT_DRAFT = Plan(0, 0, upstream=False, draft=True)


@dataclass(slots=True)
class Outcome:
    """What the rows of a plan gave."""

    #: The byte of every causal row that gives one; of a verification, the accepted bytes and the one after them.
    ids: Sequence[int] = ()
    #: How many bytes of the draft were accepted.
    accepted: int = 0
    #: The block after its steps, MASK_ID where a position is still masked.
    block_ids: Sequence[int] = ()
    #: For every position of the block the step, from 1, that filled it; 0: none of these. Empty where nobody asks.
    block_steps: Sequence[int] = ()
    #: Whether nothing is masked any more.
    block_done: bool = False
    #: Denoising steps that were taken.
    steps: int = 1
    #: Of a whole filtered draft: bytes that blocks proposed to the filter, and how many of them it kept.
    proposed: int = 0
    passed: int = 0


@dataclass(slots=True)
class Progress:
    """What a pass means for a request: bytes that are now final, and what drafting did."""

    #: Bytes that are final.
    commit: Sequence[int] = ()
    #: The denoising step, from 1, that filled each of them; empty where causal rows gave them.
    commit_steps: Sequence[int] = ()
    #: The denoising step, from 1, that filled each byte of the draft that was verified, 0 where the decoder drafted it;
    #: empty where nobody asks.
    draft_steps: Sequence[int] = ()
    #: That draft itself.
    verified: Sequence[int] = ()
    #: Bytes after them that the next plan stands on, and that may be taken back.
    draft: Sequence[int] = ()
    #: How many rows stay computed: positions 0..keep - 1. None: all.
    keep: int | None = None
    #: Bytes of a draft that was verified, and how many of them were accepted.
    drafted: int = 0
    accepted: int = 0
    #: Denoising steps taken, and rounds completed.
    steps: int = 0
    rounds: int = 0
    #: Bytes that blocks proposed to the decoder's filter, and how many of them it kept (BLT-DSV).
    proposed: int = 0
    passed: int = 0


def fixed_by(earlier: Sequence[int], now: Sequence[int], before: int) -> list[int]:
    """The denoising step that filled each position of a block, from 1; 0 where none has.

    `earlier` is that after `before` steps, or empty where none was made; `now` has the steps of one more pass, counted
    from 1, or is empty where that is not known, since nobody asks.
    """
    if not now:
        return list(earlier)
    return [before + step if step else was for was, step in zip(earlier or [0] * len(now), now, strict=True)]


class Method(Protocol):
    """One request's decoding method."""

    def plan(self, known: int, computed: int, left: int) -> Plan:
        """The rows wanted next. Called once after each `advance`.

        `known` counts the request's final bytes, BOS included. Rows 0..computed - 1 of them have been through all
        modules; the others are at first the end of the prompt, later the newest byte. `left` is how many bytes the
        request may still produce.
        """
        ...

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        """Take the outcome of `plan`."""
        ...

    def reset(self) -> None:
        """Forget drafts: the request was preempted and will be computed again."""
        ...
