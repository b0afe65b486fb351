"""What a decoding method says: the rows a request wants next, and what their results mean. It knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastblt.kernels.unmasking import ONE_STEP


@dataclass(frozen=True)
class Unmask:
    """How the masked positions of a block are chosen (design §2.7). `bound` is a probability or nats, by rule; the last
    of the steps that are `left`, if they are counted, fills everything."""

    rule: int
    bound: float
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
    """Decoder rows of one pass, taken whole or not at all.

    `causal` rows stand at [start, start + causal) over known or drafted bytes; the last `samples` of them each give a
    byte, and more than one verify the draft that they stand on. With `upstream` they first pass entropy model, encoder
    and, where patches close, the global transformer. Each then reads its own latent and stays computed; with `draft`
    all read the newest one and none does. Then come bidirectional rows for `block_ids`, on the newest latent; where a
    plan has both a selected row and a block, that row's byte is the block's first. With `provisional` the newest latent
    is that of the open patch, closed for the occasion. Where the patch is still open behind the causal rows, `if_open`
    is the plan instead. The next plan is sure to need the entropies of the rows below `scan_to`, over bytes that this
    one gives: if it leaves nothing masked.

    A plan of a single row may go on by itself up to `repeat` rows, each over the byte that the one before it gave: with
    `draft` so far, else until a byte closes a patch or ends the text. The outcome then has the bytes of all these rows.
    A plan with a block may go on up to `repeat` steps, until nothing is masked. A verification behind which the method
    would draft up to `next_length` bytes, over the byte it gives as a causal row, a block as its `unmask` says or
    without one single rows, may go on with that draft, up to `repeat` passes with its own: the draft's outcome then
    comes with the plan `NEXT_DRAFT`, for which the method was not asked. Whoever runs the plan may stop it after any
    row or step.
    """

    start: int
    causal: int
    upstream: bool = True
    draft: bool = False
    samples: int = 0
    block_ids: Sequence[int] = ()
    provisional: bool = False
    unmask: Unmask | None = None
    scan_to: int = 0
    if_open: Plan | None = None
    repeat: int = 1
    next_length: int = 0
    #: How many rows there are, and the position after the last causal one; every pass asks several times.
    rows: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.causal + len(self.block_ids)
        self.end = self.start + self.causal

    def draft_next(self, length: int, unmask: Unmask | None, passes: int) -> None:
        """Let a verification go on with a draft of up to so many bytes, in so many passes."""
        self.next_length, self.unmask, self.repeat = length, unmask, 1 + passes

    def stop_after(self, repeat: int) -> None:
        """Go on by itself no further than `repeat` rows, or steps."""
        if repeat < self.repeat:
            self.repeat = repeat
            if repeat == 1:
                self.next_length = 0
            if self.draft and not self.block_ids:
                # Its last byte will not be there.
                self.scan_to = 0


#: Stands for the plan of a draft with which a verification went on.
NEXT_DRAFT = Plan(0, 0, upstream=False, draft=True)


@dataclass(slots=True)
class Outcome:
    """What the rows gave: the byte of the selected causal row (where several verify a draft, its first `accepted` bytes
    and the one after them), and the block after its `steps`. Where somebody wants to know, `block_steps` are the steps
    that fixed its bytes (0: none of them)."""

    ids: Sequence[int] = ()
    accepted: int = 0
    block_ids: Sequence[int] = ()
    block_steps: Sequence[int] = ()
    block_done: bool = False
    steps: int = 1


@dataclass(slots=True)
class Progress:
    """What a pass settled. `commit` are bytes now fixed; `draft` stands after them, to be taken back or verified.

    `commit_steps` are the denoising steps, from 1, that fixed them (empty: causal rows did). `keep` is how many rows
    stay computed (positions 0..keep-1); None keeps all.
    """

    commit: Sequence[int] = ()
    commit_steps: Sequence[int] = ()
    draft: Sequence[int] = ()
    keep: int | None = None
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    rounds: int = 0


class Method(Protocol):
    """One request's decoding method.

    `known` counts the request's fixed bytes, BOS included, of which the rows 0..computed-1 have been through all
    modules; `left` is how many bytes it may still produce. The rows from `computed` on are at first the end of the
    prompt, later what stands between rounds.
    """

    def plan(self, known: int, computed: int, left: int) -> Plan:
        """The rows wanted next. Called once after each `advance`."""
        ...

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        """What the outcome of `plan` settles."""
        ...

    def reset(self) -> None:
        """Forget drafts: the request was preempted."""
        ...
