"""Fused steps: several passes of the decoder, with the choice of bytes between them, in one C call.

On a CPU, for models whose local modules are C, and for requests that want nothing but ids (`Sequence.fusable`), or one
pass of a request with masks (`Sequence.masked`). Drafts of BLT-S and the bytes of BLT go row after row (`run_rows`);
blocks step after step, and verifications with the choice of their bytes (`run_plans`).
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from fastblt.kernels.cpu.decoder_steps import CORRECTED, SINGLE_ROWS, DecoderSteps, Made, Plans
from fastblt.kernels.cpu.multi_step import OPENED, MultiStep
from fastblt.kernels.cpu.structs import Spent
from fastblt.kernels.unmasking import ONE_STEP
from fastblt.models.patching import PatchRule
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE
from fastblt.server.decoding.method import Plan, Unmask
from fastblt.server.engine.device.cost import DRAFT, STEP
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.rounds import PlanRounds, RowRounds
from fastblt.server.engine.runner.batch import latent_slots
from fastblt.server.engine.runner.filtered_draft import FilteredDraft
from fastblt.server.engine.runner.sampler import Result, Sampler
from fastblt.server.engine.runner.samples import DraftResult
from fastblt.server.engine.sequence import Planned
from fastblt.server.request import MAX_DRAFT_LENGTH, Ledger

#: Stand for the denoising step of a plan without a block, and of one behind which single rows are drafted.
_NO_STEP, _SINGLE_ROWS = Unmask(ONE_STEP, 0.0), Unmask(SINGLE_ROWS, 0.0)


def _columns(numbers: list[int], count: int) -> np.ndarray:
    """Columns int32 [n, requests] of the requests' numbers, n for each, in a row."""
    return np.ascontiguousarray(np.array(numbers, dtype=np.int32).reshape(count, -1).T)


def _is_whole_draft(plan: Plan) -> bool:
    """Whether the call makes a whole filtered draft, of which the plan has the first block."""
    return plan.draft and plan.next_length > 0


def _masks(planned: list[Planned]) -> np.ndarray | None:
    """What the selected rows may give, bool [requests, most selected rows, 260]; None where all may give all ids."""
    if not any(sequence.masked for sequence, _ in planned):
        return None
    table = np.ones((len(planned), max(plan.samples for _, plan in planned), VOCAB_SIZE), dtype=np.bool_)
    for own, (sequence, plan) in zip(table, planned, strict=True):
        if sequence.masked and plan.samples and (constraint := sequence.constraint) is not None:
            for row, mask in zip(own, constraint.along(sequence.draft)[-plan.samples :], strict=False):
                if mask is not None:
                    row[:] = mask
    return table


class FusedSteps:
    """Carries out plans by C calls, and counts their passes in the runner's `ledger` and `work`."""

    def __init__(
        self,
        forward: ModuleForward,
        steps: MultiStep | RowRounds,
        decoder_steps: DecoderSteps | PlanRounds,
        sampler: Sampler,
        rule: PatchRule,
        ledger: Ledger,
        work: list[tuple[str, int]],
    ) -> None:
        self._forward = forward
        self._steps = steps
        self._decoder_steps = decoder_steps
        self._sampler = sampler
        self._rule = rule
        self._ledger = ledger
        self._work = work
        #: Whether the decoder's rows begin as the encoder's states (else as embeddings).
        self._encoder_input = steps.encoder_input

    def time(self, columns: np.ndarray, rule: PatchRule) -> None:
        """Steps of single rows, to be timed; columns as in `fastblt.kernels.cpu.multi_step`."""
        self._forward.steps(self._steps, columns, rule, sampled=False, truncated=False)

    def time_filter(self, count: int, context: int, block: int) -> int:
        """Filtered drafts of `count` null requests at position `context`, to be timed. Returns the inner rounds of
        one of them; 0 where a choice was not finite."""
        left = MAX_DRAFT_LENGTH + 2
        # As in `decoder_steps.COLUMNS`: no rows of its own, then a draft.
        own = (0, context, 0, 0, 0, 0, 0, ONE_STEP, 0, left, context, context, 0, MAX_DRAFT_LENGTH, left, block)
        asked = Plans([own] * count, [0.0] * count, [], [])
        made = self._forward.decode_steps(self._decoder_steps, asked, sampled=False, truncated=False)
        line = made.lines[0]
        return 0 if made.drafts.bad[line] else int((made.drafts.fixed[line] == CORRECTED).sum())

    def run_rows(self, planned: list[Planned]) -> list[Result]:
        """Plans of one row that go on over the bytes they give: all rows of all requests."""
        numbers: list[int] = []
        encoder_input = self._encoder_input
        for sequence, plan in planned:
            latent, _ = latent_slots(sequence, plan)
            numbers += (sequence.state_index, plan.start, latent, plan.repeat)
            # Rows that may go through the entropy model, where the open patch began (-1: a draft, which closes none),
            # and whether the first row is to be encoded first: the rest of `multi_step.COLUMNS`.
            if plan.draft:
                scans = max(plan.scan_to - sequence.scanned, 0)
                numbers += (scans, -1, encoder_input and sequence.encoded < plan.end)
            else:
                numbers += (sequence.left - 1, sequence.open_start, 0)
        sampled, truncated, _ = self._sampler.needs(planned)
        columns = _columns(numbers, len(planned))
        steps = self._forward.steps(self._steps, columns, self._rule, sampled=sampled, truncated=truncated)
        ids, entropies = steps.ids.tolist(), steps.entropies.tolist()
        results: list[Result] = []
        for at, ((sequence, plan), made, scanned) in enumerate(
            zip(planned, steps.made.tolist(), steps.scanned.tolist(), strict=True)
        ):
            ledger = sequence.ledger
            ledger.decoder += made
            if plan.draft:
                ledger.patcher += scanned > 0
            else:
                ledger.patcher += scanned
            if encoder_input or not plan.draft:
                ahead = plan.draft and scanned > 0 if steps.ahead is None else int(steps.ahead[at])
                encoded = plan.start + made + ahead
                ledger.encoder += encoded - max(sequence.encoded, plan.start)
                sequence.encoded = encoded
            result = Result(ids[at][:made], extra_rows=made - 1, bad=int(steps.bad[at]))
            if scanned:
                result.entropies = entropies[at][:scanned]
            results.append(result)
        self._steps_taken(steps.made, steps.scanned, columns[OPENED] >= 0)
        self._count_other_passes(steps.spent)
        return results

    def run_plans(self, planned: list[Planned]) -> list[Result]:
        """Verifications with the drafts behind them, and blocks with all their steps."""
        rows: list[tuple[int, ...]] = []
        bounds: list[float] = []
        reads: list[tuple[int, int]] = []
        block_ids: list[int] = []
        sizes: list[int] = []
        total = 0
        for sequence, plan in planned:
            newest, own = latent_slots(sequence, plan)
            drafts_next = plan.next_length > 0
            step = plan.unmask or (_SINGLE_ROWS if drafts_next else _NO_STEP)
            bounds.append(step.bound)
            if _is_whole_draft(plan):
                # No row of its own: all of them are the draft's.
                sizes.append(0)
                own, causal, samples = [], 0, 0
            else:
                reads += own
                block_ids += plan.block_ids
                sizes.append(len(plan.block_ids))
                total += plan.rows
                causal, samples = plan.causal, plan.samples
                sequence.ledger.decoder += 1
            # As in `decoder_steps.COLUMNS`.
            rows.append(
                (
                    sequence.state_index,
                    plan.start,
                    causal,
                    samples,
                    sizes[-1],
                    newest,
                    len(own),
                    step.rule,
                    step.left or 0,
                    plan.repeat - drafts_next,
                    sequence.encoded,
                    sequence.scanned,
                    plan.scan_to if plan.scan_to > sequence.scanned else 0,
                    plan.next_length,
                    sequence.left if drafts_next else 0,
                    plan.next_block,
                )
            )
        sampled, truncated, _ = self._sampler.needs(planned)
        asked = Plans(rows, bounds, reads, block_ids, _masks(planned))
        decoded = self._forward.decode_steps(self._decoder_steps, asked, sampled=sampled, truncated=truncated)
        made, encoder_input = decoded.made, self._encoder_input
        results: list[Result] = []
        for (sequence, plan), size, chosen, accepted, steps, block, entropies in zip(
            planned, sizes, decoded.chosen, decoded.accepted, made.steps, made.ids, made.entropies, strict=True
        ):
            ledger = sequence.ledger
            if _is_whole_draft(plan):
                results.append(Result(steps=0))
                continue
            result = Result(steps=steps)
            if plan.samples:
                result.accepted = accepted
                result.ids = chosen[: accepted + 1]
            if size:
                result.block_ids = block = block[:size]
                result.block_done = MASK_ID not in block
                # The block's first pass is counted above.
                ledger.decoder += steps - 1
            if encoder_input and sequence.encoded < plan.end:
                ledger.encoder += 1
                sequence.encoded = plan.end
            if plan.scan_to > sequence.scanned and (result.block_done or not size):
                ledger.patcher += 1
                ledger.encoder += 1
                sequence.encoded = plan.scan_to
                result.entropies = entropies[: plan.scan_to - sequence.scanned]
            results.append(result)
        if any(made.bad):
            for result, bad in zip(results, made.bad, strict=True):
                result.bad = bad
        # What has no rows took no step.
        whole = [_is_whole_draft(plan) for _, plan in planned]
        taken_steps = [0 if at_once else steps for at_once, steps in zip(whole, made.steps, strict=True)]
        self._block_steps(total, sizes, taken_steps)
        if decoded.drafts.steps:
            self._drafts(planned, results, decoded.lines, decoded.drafts)
        self._count_other_passes(decoded.spent)
        return results

    def _drafts(self, planned: list[Planned], results: list[Result], lines: list[int], drafts: Made) -> None:
        """Add the drafts that the call made behind verifications to the results of these."""
        sizes, singles = [0] * len(drafts.steps), [0] * len(drafts.steps)
        filtered: list[FilteredDraft] = []
        for (sequence, plan), result, line in zip(planned, results, lines, strict=True):
            if line < 0:
                continue
            ledger, taken, steps = sequence.ledger, len(result.ids), drafts.steps[line]
            size, start = min(plan.next_length, sequence.left - taken - 1), plan.end - plan.samples + taken
            ledger.decoder += steps
            ids = drafts.ids[line]
            draft = result.next_draft = DraftResult(bad=drafts.bad[line], steps=steps)
            if plan.next_block:
                if not draft.bad:
                    length, size = size, int(np.count_nonzero(drafts.fixed[line, :size]))
                    made = FilteredDraft(drafts.fixed[line, :size].tolist(), plan.next_block, steps, length)
                    filtered.append(made)
                    self._filtered(ledger, made, draft, ids[:size], start)
                    # BLT's last byte may have been through the entropy model already.
                    known = sequence.scanned - start if _is_whole_draft(plan) else 0
                    draft.entropies = drafts.entropies[line][known : size + 1]
                continue
            if plan.unmask is None:
                singles[line], draft.ids, whole = steps, ids[:steps], steps == size
                encoded = steps + whole if self._encoder_input else 0
                ledger.encoder += encoded
            else:
                sizes[line], draft.block_ids = size, ids[:size]
                whole = draft.block_done = MASK_ID not in draft.block_ids
                encoded = size + 1 if whole else int(self._encoder_input)
                ledger.encoder += self._encoder_input + whole
            draft.encoded = start + encoded
            if whole:
                ledger.patcher += 1
                draft.entropies = drafts.entropies[line][: size + 1]
        if filtered:
            self._filtered_steps(filtered)
        if any(sizes):
            steps_of_blocks = [steps if size else 0 for steps, size in zip(drafts.steps, sizes, strict=True)]
            self._block_steps(sum(sizes) + len(sizes) - sizes.count(0), sizes, steps_of_blocks)
        if any(singles):
            taken_steps = np.array(singles)
            self._steps_taken(taken_steps, taken_steps, np.zeros(len(singles), dtype=np.bool_))

    def _filtered(self, ledger: Ledger, made: FilteredDraft, draft: DraftResult, ids: list[int], start: int) -> None:
        """What became of a filtered draft over the byte at `start`, into its result and the request's ledger."""
        draft.ids, draft.steps, draft.proposed, draft.passed = ids, made.block_steps, made.proposed, made.passed
        draft.encoded = start
        ledger.patcher += 1
        if self._encoder_input:
            draft.encoded += len(ids) + 1
            ledger.encoder += made.encoder_passes + 1

    def _filtered_steps(self, filtered: list[FilteredDraft]) -> None:
        """The passes of filtered drafts into ledger and work: of each those who took part in it."""
        passes = [made.rows_of_passes() for made in filtered]
        self._ledger.decoder += max(map(len, passes))
        self._work += [("decoder", sum(rows)) for rows in zip_longest(*passes, fillvalue=0)]
        if self._encoder_input:
            # One of them is counted with the passes beside the steps.
            self._ledger.encoder += max(made.encoder_passes for made in filtered) - 1

    def _block_steps(self, rows: int, sizes: list[int], steps: list[int]) -> None:
        """Count decoder passes: a first one of `rows` rows, and more for blocks of these sizes, by their steps."""
        most = max(steps)
        if not most:
            return
        self._ledger.decoder += most
        self._work.append(("decoder", rows))
        if most > 1:
            own, taken = np.array(sizes), np.array(steps)
            self._work += [("decoder", int(own[taken > step].sum())) for step in range(1, most)]

    def _steps_taken(self, made: np.ndarray, scanned: np.ndarray, stays: np.ndarray) -> None:
        """Count passes of single rows: step i has a row of every request that took so many."""
        encoded = made - 1 if self._encoder_input else np.where(stays, made - 1, 0)
        for module, each in (("decoder", made), ("patcher", scanned[stays]), ("encoder", encoded)):
            setattr(self._ledger, module, getattr(self._ledger, module) + int(each.max(initial=0)))
        for kind, each in ((STEP, made[stays]), (DRAFT, made[~stays])):
            self._work += [
                (kind, rows) for rows in (each > np.arange(int(each.max(initial=0)))[:, None]).sum(1).tolist()
            ]

    def _count_other_passes(self, spent: Spent) -> None:
        """Count the passes of encoder and entropy model that the call made apart from the steps."""
        for module, rows in zip(("encoder", "patcher", "encoder"), spent.rows, strict=True):
            if rows:
                setattr(self._ledger, module, getattr(self._ledger, module) + 1)
                self._work.append((module, rows))
