"""After a pass: its results go to the sequences, final bytes to their outputs, and requests end."""

from __future__ import annotations

import math
from collections import abc

from fastblt.kernels.types import NOT_FINITE
from fastblt.models.accounting import gb, gb_paper
from fastblt.server.decoding.auto import Auto
from fastblt.server.decoding.method import NEXT_DRAFT, Plan, Progress
from fastblt.server.engine.context import EngineContext
from fastblt.server.engine.rounds import RoundLog
from fastblt.server.engine.runner.samples import DraftResult, Result
from fastblt.server.engine.sequence import Sequence
from fastblt.server.request import (
    MAX_DRAFT_LENGTH,
    ByteLogprobs,
    DecodingMethod,
    Delta,
    ErrorCode,
    FinishReason,
    Ledger,
)

#: Counts of drafting. The engine's ledger has them of ended requests; `Engine.stats` adds the running ones.
DRAFTING = ("rounds", "steps", "drafted", "accepted", "proposed", "passed", "kept", "wasted")


class Postprocessor:
    """Applies the results of passes to the sequences they were for, and ends sequences."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._caches = context.caches
        self._scheduler = context.scheduler
        self._prefix = context.prefix
        self._runner = context.runner
        self._sequences = context.sequences
        self._rule = context.rule
        self.bytes_generated = 0
        #: Verified drafts by their length, and by how much of it was accepted.
        self.drafts = [0] * (MAX_DRAFT_LENGTH + 1)
        self.accepted = [0] * (MAX_DRAFT_LENGTH + 1)

    def add_traffic(self, ledger: Ledger) -> None:
        """Set the gigabytes that the ledger's passes read, by the paper's accounting and by ours."""
        ledger.gb_paper = gb_paper(self._context.parameters, ledger.decoder, ledger.global_)
        ledger.gb = gb(self._context.parameters, ledger, self._context.bytes_per_weight, self._context.patcher_bytes)

    def process(self, sequence: Sequence, plan: Plan, result: Result) -> Delta | None:
        """Apply the result of a plan to its sequence. Returns what the request gets, if anything."""
        sequence.plan, sequence.ready = None, False
        if result.scores is not None:
            sequence.score(result.scores)
            if any(math.isnan(score.logprob) for score in result.scores):
                result.bad |= NOT_FINITE
        if result.bad:
            return self._failed(sequence, result.bad)
        if plan.draft and sequence.ids_only and not plan.upstream:
            # A step of a draft: no row stays computed, no page is filled, and the request gets nothing.
            progress = sequence.method.advance(plan, result)
            if progress.keep is not None:
                sequence.cut(progress.keep)
            self._count(sequence, progress)
            sequence.take_draft(progress.draft)
            if result.entropies is not None:
                sequence.take_entropies(result.entropies, self._rule)
            return None
        if plan.upstream and not plan.draft:
            sequence.decoded = plan.end + result.extra_rows
        # The method does not know of the chunks of a prompt before the last.
        progress = Progress() if sequence.prefilling else sequence.method.advance(plan, result)
        if progress.keep is not None and (freed := sequence.cut(progress.keep)):
            self._scheduler.free_latents(freed)
        self._count(sequence, progress)
        logprobs = None
        if not sequence.ids_only:
            if sequence.params.return_patches:
                sequence.steps += progress.commit_steps or [1] * len(progress.commit)
            if sequence.rounds is not None and progress.commit:
                self._note_round(sequence, sequence.rounds, progress)
            if sequence.params.logprobs is not None:
                logprobs = self._logprobs(sequence, plan, progress, result)
        if result.entropies is not None:
            sequence.take_entropies(result.entropies, self._rule)
        delta = None
        if progress.commit:
            delta = self._commit(sequence, progress.commit, progress.accepted, logprobs)
            if delta is not None and delta.finish_reason is not None:
                return delta
        sequence.take_draft(progress.draft)
        if progress.commit:
            if sequence.provisional is not None:
                self._scheduler.drop_provisional(sequence)
        elif not plan.upstream:
            # A step of a draft or block: no row stays computed, and no page is filled.
            return None
        self._prefix.insert(sequence)
        if len(sequence.patches) > 1:
            self._scheduler.free_latents(sequence.forget_patches())
        patches = sequence.closed + (sequence.provisional is not None)
        self._caches.free_unread(sequence.state_index, sequence.decoded, patches, sequence.unpooled)
        return delta

    def process_next_draft(self, sequence: Sequence, draft: DraftResult) -> Delta | None:
        """Apply the draft that was made behind a verification, after that. Returns what the request gets, if
        anything."""
        if draft.bad:
            return self._failed(sequence, draft.bad)
        progress = sequence.method.advance(NEXT_DRAFT, draft)
        self._count(sequence, progress)
        sequence.take_draft(progress.draft)
        sequence.encoded = draft.encoded
        if draft.entropies:
            sequence.take_entropies(draft.entropies, self._rule)
        return None

    def decide(self, sequence: Sequence) -> Delta | None:
        """What the grammar says of a sequence's last byte, once it does; the news of it, if that was the end."""
        output = sequence.output
        if not output.decide():
            return None
        assert output.finish_reason is not None
        return self._finish_as(sequence, output.finish_reason)

    def _finish_as(self, sequence: Sequence, reason: FinishReason) -> Delta:
        """End a sequence as its output says."""
        if reason is FinishReason.ERROR and sequence.constraint is not None:
            return self.finish(sequence, reason, sequence.constraint.problem, sequence.constraint.problem_code)
        return self.finish(sequence, reason)

    def _failed(self, sequence: Sequence, bad: int) -> Delta:
        """End a sequence in whose rows nothing could be chosen, for a reason of the selection kernels."""
        if bad & NOT_FINITE:
            self._prefix.forget(sequence)
            text = "the model produced NaN or infinity for this request"
            return self.finish(sequence, FinishReason.ERROR, text, ErrorCode.NOT_FINITE)
        text = "penalties, bias and constraints of this request leave no byte that could be chosen"
        return self.finish(sequence, FinishReason.ERROR, text, ErrorCode.NOTHING_LEFT)

    def _count(self, sequence: Sequence, progress: Progress) -> None:
        """Count what drafting did, and tell the controller of `auto`."""
        ledger = sequence.ledger
        ledger.steps += progress.steps
        ledger.rounds += progress.rounds
        if progress.proposed:
            ledger.proposed += progress.proposed
            ledger.passed += progress.passed
            if (controller := self._context.controller) is not None and isinstance(sequence.method, Auto):
                controller.filtered(sequence.method.draft, progress.proposed, progress.passed)
        if progress.drafted:
            ledger.drafted += progress.drafted
            ledger.accepted += progress.accepted
            self.drafts[progress.drafted] += 1
            self.accepted[progress.accepted] += 1
            if (controller := self._context.controller) is not None and isinstance(sequence.method, Auto):
                controller.round_ended(sequence.method.draft, progress.drafted, progress.accepted)

    def _note_round(self, sequence: Sequence, rounds: RoundLog, progress: Progress) -> None:
        """Record how bytes were made that are about to be committed."""
        method = sequence.method
        made_by = method.draft.method if isinstance(method, Auto) else sequence.decoding.method
        rounds.add(
            made_by or DecodingMethod.BLT,
            len(sequence.output.ids),
            progress,
            self._context.clock() - sequence.timings.arrival,
            sequence.ledger,
            sequence.entropies,
            [start - sequence.prompt_length for start in sequence.starts],
            lambda ledger: gb(self._context.parameters, ledger, self._context.bytes_per_weight),
        )

    def _logprobs(self, sequence: Sequence, plan: Plan, progress: Progress, result: Result) -> list[ByteLogprobs]:
        """Log-probabilities of the committed bytes, from their causal rows or from the steps that filled them."""
        if result.block_logprobs is not None and not plan.draft:
            for at, value in enumerate(result.block_logprobs):
                if value is not None:
                    sequence.block_logprobs[at] = value
            if not progress.commit:
                return []
            values = [sequence.block_logprobs[at] for at in range(len(progress.commit))]
            sequence.block_logprobs.clear()
            return values
        return (result.logprobs or [])[: len(progress.commit)]

    def _commit(
        self, sequence: Sequence, ids: abc.Sequence[int], accepted: int, logprobs: list[ByteLogprobs] | None
    ) -> Delta | None:
        """Append final bytes, of which the first `accepted` were drafted; the text may end within them."""
        if sequence.timings.first_byte is None:
            sequence.timings.first_byte = self._context.clock()
        output, ledger = sequence.output, sequence.ledger
        if sequence.ids_only and output.pass_on(ids):
            self.bytes_generated += len(ids)
            ledger.kept += accepted
            sequence.ids += ids
            if sequence.penalizes:
                self._runner.commit(sequence, ids)
            return Delta(sequence.request.request_id, list(ids))
        before = len(output.ids)
        taken = output.extend(ids, logprobs)
        new = len(output.ids) - before
        # A stop string can take back more than this pass gave.
        self.bytes_generated += max(new, 0)
        ledger.kept += max(min(accepted, new), -ledger.kept)
        if output.finish_reason is not None:
            ledger.wasted += len(ids) - taken
            return self._finish_as(sequence, output.finish_reason)
        sequence.ids += ids
        if sequence.penalizes:
            self._runner.commit(sequence, ids)
        released, values = output.release()
        if not released:
            return None
        wanted = values if logprobs is not None else None
        scores, rounds = sequence.take_scores(), sequence.take_rounds()
        return Delta(sequence.request.request_id, released, wanted, prompt_logprobs=scores, rounds=rounds)

    def finish(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, code: ErrorCode | None = None
    ) -> Delta:
        """End a sequence, wherever it is, and free all it holds."""
        self._scheduler.count_output(len(sequence.output.ids))
        if sequence.state_index:
            self._scheduler.remove(sequence)
        else:
            self._scheduler.waiting.remove(sequence)
        del self._sequences[sequence.request.request_id]
        sequence.close()
        sequence.timings.finished = self._context.clock()
        ledger, total = sequence.ledger, self._runner.ledger
        sequence.count_patches()
        for name in (*DRAFTING, "bytes", "patched_bytes", "patches"):
            setattr(total, name, getattr(total, name) + getattr(ledger, name))
        self.add_traffic(ledger)
        output = sequence.output
        output.finish_reason = reason
        released, values = output.release()
        return Delta(
            sequence.request.request_id,
            released,
            values if sequence.params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=output.stop_reason,
            error=error,
            error_code=code,
            ledger=ledger,
            timings=sequence.timings,
            decoding=sequence.decoding,
            patches=sequence.report(),
            rounds=sequence.take_rounds(final=True),
            cached=sequence.cached or 0,
            prompt_logprobs=sequence.take_scores(),
            ending=output.ending,
        )
