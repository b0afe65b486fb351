"""A request inside the engine: its bytes, how far each module has come, and its patches."""

from __future__ import annotations

from bisect import bisect_left
from collections import abc, deque
from dataclasses import dataclass

from fastblt.models.patching import PatchRule
from fastblt.server.decoding.method import Method, Plan
from fastblt.server.engine.constraints.constraint import Constraint
from fastblt.server.engine.output import Output
from fastblt.server.engine.rounds import RoundLog
from fastblt.server.request import ByteLogprobs, DecodingParams, Ledger, PatchReport, Request, Round, Timings


@dataclass(slots=True)
class Patch:
    """A closed patch over positions [start, end]. `slot` holds its latent; 0 until the global transformer has run."""

    index: int
    start: int
    end: int
    slot: int = 0


class Sequence:
    """State of one accepted request.

    Between rounds it depends on `ids` and `decoded` alone: whatever refused drafts computed is cut off (design §3).
    `scanned`, `encoded` and `decoded` count the rows that the entropy model, the encoder and the decoder have computed.
    `state_index` is the request's row in the engine's arrays; 0 while it waits in the queue.
    """

    def __init__(
        self,
        request: Request,
        decoding: DecodingParams,
        method: Method,
        seed: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.request = request
        self.params = request.params
        self.decoding = decoding
        self.method = method
        self.seed = seed
        self.ids = list(request.prompt_ids)
        self.prompt_length = len(self.ids)
        self.constraint = constraint
        self.output = Output(request.params, constraint)
        #: Whether starts of patches and entropies are kept, to be told.
        self.reports = self.params.return_patches or self.params.return_rounds
        #: What is to be told of its rounds, if that is asked for.
        self.rounds = RoundLog() if self.params.return_rounds else None
        #: Whether it needs nothing but ids from a pass: no log-probabilities, patches or constraints.
        told = self.reports or (self.params.logprobs, self.params.prompt_logprobs) != (None, None)
        self.ids_only = constraint is None and not told
        self.penalizes = self.params.penalizes
        #: Whether several passes may run in one call, because the host has nothing to do between them (`FusedSteps`).
        self.fusable = self.ids_only and not self.penalizes
        #: Whether one pass may run in one call with the choice of its bytes, with masks that the host gives.
        self.masked = constraint is not None and not told and not self.penalizes
        #: The denoising step of every produced byte, if patches are asked for.
        self.steps: list[int] = []
        #: How many rows of the prompt have log-probabilities. `_scores` has those that have not been returned yet.
        self.scored = 0
        self._scores: list[ByteLogprobs] = []
        self.ledger = Ledger()
        self.timings = Timings(arrival=request.arrival)
        self.state_index = 0
        #: Number of the last pass that it took part in, for fairness under a row budget.
        self.last_pass = 0
        #: The order in which requests came; when it is due in the queue; and when its last turn began. In seconds.
        self.number = 0
        self.due = self.turn_began = 0.0
        #: Whether it waits for a page of its prompt that another request computes.
        self.follows = False
        #: Whether it has done so for nothing: the other one was preempted. It waits for nobody again.
        self.waited_in_vain = False
        #: The keys of its prompt's pages (`prompts.page_keys`).
        self.page_keys: list[int] | None = None
        #: How many bytes were known when memory ran out in one of its passes; None if that never happened.
        self.starved_at: int | None = None
        #: Bytes of the prompt that were cached when it was first admitted; None before that.
        self.cached: int | None = None
        self.decoded = 0
        #: Positions after the prompt that start a patch. Some may be those of drafted bytes.
        self.starts: list[int] = []
        #: Entropies (nats) of the rows from the prompt's last on, if patches or rounds are asked for.
        self.entropies: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Reset to nothing computed: at the start, or when preempted. Keeps the patches known for the report."""
        self._cut_report(self.decoded)
        #: The number of rows whose patches are known for the report. If they are cached, they are not computed again.
        self.reached = self.decoded
        self.scanned = self.encoded = self.decoded = 0
        #: Whether the prompt is still being computed in chunks. With its last rows the method takes over.
        self.prefilling = True
        self.open_start = 0
        self.closed = 0
        #: The closed patches that rows not yet decoded may cross-attend to, oldest first.
        self.patches: deque[Patch] = deque()
        self.provisional: Patch | None = None
        #: Drafted bytes that follow `ids`.
        self.draft: abc.Sequence[int] = ()
        self.plan: Plan | None = None
        self.ready = False
        #: Log-probabilities of the block that is being filled, by offset in the block.
        self.block_logprobs: dict[int, ByteLogprobs] = {}
        self.method.reset()

    def resume(self, at: int, patch: Patch | None) -> None:
        """Start at position `at`; the rows before it are cached. A patch begins there; `patch` is the one before it."""
        self.scanned = self.encoded = self.decoded = self.open_start = at
        if patch is not None:
            self.closed = patch.index + 1
            self.patches.append(patch)
        self._cut_report(at)
        self.reached = at

    @property
    def known(self) -> int:
        return len(self.ids)

    @property
    def left(self) -> int:
        return self.params.max_tokens - len(self.output.ids)

    def close(self) -> None:
        """Release the constraint: the request has ended, or was not accepted."""
        if self.constraint is not None:
            self.constraint.close()

    @property
    def undecided(self) -> bool:
        """Whether the request may have ended already: its grammar has not yet said what can follow."""
        return self.constraint is not None and self.constraint.undecided

    @property
    def followed(self) -> bool:
        """Whether a process follows its grammar, or is about to."""
        return self.constraint is not None and self.constraint.followed

    def take_draft(self, draft: abc.Sequence[int]) -> None:
        """Take what is drafted so far. Asks for the masks behind it, which a process makes while others are served."""
        self.draft = draft
        if self.constraint is not None:
            self.constraint.ready(draft, ())

    def take_entropies(self, entropies: list[float], rule: PatchRule) -> None:
        """Take the entropies (nats) of the next rows, and close patches where the rule says so."""
        if self.reports:
            self.entropies += entropies[max(self.prompt_length - 1 - self.scanned, 0) :]
        for end in rule.ends(self.scanned, entropies, self.open_start):
            self.patches.append(Patch(self.closed, self.open_start, end))
            self.closed += 1
            self.open_start = end + 1
            if self.open_start >= self.prompt_length:
                self.starts.append(self.open_start)
        self.scanned += len(entropies)

    @property
    def pending(self) -> bool:
        """Whether there are `pending_patches`. Patches get latents in order, so only the newest is checked."""
        patches, provisional = self.patches, self.provisional
        return bool(patches and patches[-1].slot == 0) or (provisional is not None and provisional.slot == 0)

    @property
    def unpooled(self) -> int:
        """The first position whose encoder state is still to be pooled into a latent."""
        if not self.pending:
            return self.open_start
        return min(patch.start for patch in self.pending_patches())

    def pending_patches(self) -> list[Patch]:
        """Closed (or force-closed) patches whose latent is still to be computed."""
        waiting = [patch for patch in self.patches if patch.slot == 0]
        if self.provisional is not None and self.provisional.slot == 0:
            waiting.append(self.provisional)
        return waiting

    def score(self, scores: list[ByteLogprobs]) -> None:
        """Append the log-probabilities of the next rows of the prompt."""
        self._scores += scores
        self.scored += len(scores)

    def take_scores(self) -> list[ByteLogprobs] | None:
        """The prompt's log-probabilities that have not been returned yet; None if there are none."""
        scores, self._scores = self._scores, []
        return scores or None

    def cut(self, keep: int) -> list[int]:
        """Roll back to rows 0..keep-1. Returns the latent slots that this frees.

        A patch stays iff its last byte does. Removing a tail changes nothing before it (design §3).
        """
        freed = []
        while self.patches and self.patches[-1].end >= keep:
            patch = self.patches.pop()
            self.closed -= 1
            self.open_start = patch.start
            if patch.slot:
                freed.append(patch.slot)
        if self.entropies or (self.starts and self.starts[-1] > keep):
            self._cut_report(keep)
        if self.scanned > keep:
            self.scanned = keep
        if self.encoded > keep:
            self.encoded = keep
        if self.decoded > keep:
            self.decoded = keep
        return freed

    def _cut_report(self, keep: int) -> None:
        """Remove from the report what rows from `keep` on added."""
        while self.starts and self.starts[-1] > keep:
            self.starts.pop()
        del self.entropies[max(keep - self.prompt_length + 1, 0) :]

    def count_patches(self) -> None:
        """Enter the output's bytes and patches in the ledger, without those of drafted bytes after it."""
        ledger, end = self.ledger, self.prompt_length + len(self.output.ids)
        ledger.bytes = len(self.output.ids)
        # Whether a byte starts a patch is known once the row before it is scanned.
        ledger.patched_bytes = max(min(max(self.scanned, self.reached) + 1, end) - self.prompt_length, 0)
        ledger.patches = bisect_left(self.starts, end)

    def report(self) -> PatchReport | None:
        """The patches of the output, if they were asked for."""
        if not self.params.return_patches:
            return None
        count = len(self.output.ids)
        known: list[float | None] = [*self.entropies[:count]]
        return PatchReport(
            starts=[start - self.prompt_length for start in self.starts[: self.ledger.patches]],
            entropies=known + [None] * (count - len(known)),
            steps=self.steps[:count],
        )

    def take_rounds(self, *, final: bool = False) -> list[Round] | None:
        """The rounds to go with the bytes that are released, if asked for; with `final`, all that are left."""
        return None if self.rounds is None else self.rounds.take(self.output.released, final=final)

    def forget_patches(self) -> list[int]:
        """Drop patches that no row from `decoded` on can read. Returns their latent slots. The newest always stays."""
        freed = []
        while len(self.patches) > 1 and self.patches[1].end <= self.decoded:
            freed.append(self.patches.popleft().slot)
        return freed


#: A sequence, and its plan for a pass.
Planned = tuple[Sequence, Plan]
