"""BLT-S: the decoder drafts alone on the newest closed latent, the full model verifies (arXiv 2605.08044 §5.1,
Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from fastblt.server.decoding.method import Outcome, Plan, Progress


def verify(draft: Sequence[int], known: int, computed: int, *, paper: bool = False) -> Plan:
    """The plan that verifies a draft: all modules run over the rows still to compute and over the drafted bytes.

    The newest byte and every drafted one give a byte. With `paper`, the global transformer runs even where no patch
    closed, as in the paper's accounting.
    """
    rows = known - computed + len(draft)
    return Plan(computed, rows, samples=len(draft) + 1, provisional=paper and bool(draft))


def finish_round(draft: Sequence[int], plan: Plan, outcome: Outcome, steps: Sequence[int] = ()) -> Progress:
    """The end of a round: the accepted bytes and the one after them are final; rows up to the last accepted byte stay
    computed (design §3, rollback). `steps` are the denoising steps that filled the draft, where blocks did."""
    return Progress(
        commit=outcome.ids,
        keep=plan.end - len(draft) + outcome.accepted,
        drafted=len(draft),
        accepted=outcome.accepted,
        rounds=1 if draft else 0,
        draft_steps=steps,
        verified=draft,
    )


class BltS:
    """Drafts `draft_length` bytes row by row, then verifies them in one pass.

    `paper_accounting` drafts on the open patch's latent, at the price of an upstream pass of its own (design §2.8), and
    does not shorten the last draft. `begun`: the request has had its first pass, which drafts nothing.
    """

    def __init__(self, draft_length: int, paper_accounting: bool = False, *, begun: bool = False) -> None:
        self._length = draft_length
        self._paper = paper_accounting
        self._draft: list[int] = []
        #: Whether drafts may be made: the first pass gives the first byte at once, whatever is left to compute.
        self._begun = begun

    def plan(self, known: int, computed: int, left: int) -> Plan:
        # The verification gives a byte of its own, so the last one is never drafted.
        wanted = self._length if self._paper else min(self._length, left - 1)
        if self._begun and len(self._draft) < wanted:
            upstream = self._paper and not self._draft
            start, missing = computed + len(self._draft), wanted - len(self._draft)
            repeat = 1 if upstream else missing
            # The last drafted byte completes what is verified next.
            scan_to = start + missing + 1 if repeat == missing else 0
            return Plan(
                start, 1, upstream, draft=True, samples=1, provisional=self._paper, scan_to=scan_to, repeat=repeat
            )  # fmt: skip
        plan = verify(self._draft, known, computed, paper=self._paper)
        if self._draft and not self._paper:
            plan.draft_next(self._length, None, self._length)
        return plan

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        if plan.draft:
            self._draft += outcome.ids
            return Progress(draft=self._draft)
        draft, self._draft = self._draft, []
        self._begun = True
        return finish_round(draft, plan, outcome)

    def reset(self) -> None:
        self._draft = []
        self._begun = False
