"""Plans of which nothing is wanted but ids, in one call each for all requests: drafts and patches row after row, blocks
step after step, verifications with the choice of their bytes. On a CPU, for models whose local modules are C."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

import numpy as np

from kernels.decoder_steps import DecoderSteps, Plans
from kernels.multi_step import OPENED, MultiStep
from kernels.unmasking import ONE_STEP
from models.patching import PatchRule
from models.vocabulary import MASK_ID
from server.decoding.method import Unmask
from server.engine.choosing import Chooser, Result
from server.engine.cost import DRAFT, STEP
from server.engine.layout import lay_out
from server.engine.passes import Passes
from server.engine.sequence import Sequence
from server.request import Ledger

#: Of a plan without a block.
_NO_STEP = Unmask(ONE_STEP, 0.0)


def agreeing(targets: abc.Sequence[int], drafted: abc.Sequence[int]) -> int:
    """How many drafted bytes are the targets, up to the first that is not: `kernels.verification` on the host."""
    count = 0
    for target, byte in zip(targets, drafted, strict=False):
        if target != byte:
            break
        count += 1
    return count


class OneCall:
    """`scan` runs the entropy model over rows [scanned, until) of sequences; passes are counted in `ledger` and `work`,
    which are the runner's."""

    def __init__(
        self,
        passes: Passes,
        steps: MultiStep,
        decoder_steps: DecoderSteps,
        chooser: Chooser,
        columns: Callable[[str, int, int], np.ndarray],
        scan: Callable[[list[Sequence], list[int]], list[list[float]]],
        rule: PatchRule,
        ledger: Ledger,
        work: list[tuple[str, int]],
    ) -> None:
        self._passes = passes
        self._steps = steps
        self._decoder_steps = decoder_steps
        self._chooser = chooser
        self._columns = columns
        self._scan = scan
        self._rule = rule
        self._ledger = ledger
        self._work = work
        #: Whether drafted rows begin as encoder states.
        self._fed = steps.fed

    def time(self, columns: np.ndarray, rule: PatchRule) -> None:
        """Steps of single rows, columns as in `kernels.multi_step`, whose results nobody wants."""
        self._passes.steps(self._steps, columns, rule, sampled=False, truncated=False)

    def go_on(self, sequences: list[Sequence]) -> list[Result]:
        """The passes of single rows, one after another, over the bytes that they give."""
        rows: list[tuple[int, ...]] = []
        for sequence in sequences:
            plan, patches = sequence.plan, sequence.patches
            assert plan is not None
            latent = patches[-1].slot if patches else 0
            if plan.draft and plan.provisional and sequence.provisional is not None:
                latent = sequence.provisional.slot
            opened = -1 if plan.draft else sequence.open_start
            rows.append((sequence.row, plan.start, latent, plan.repeat, sequence.left - 1, opened))
        sampled, truncated, _ = self._chooser.needs(sequences)
        columns = np.ascontiguousarray(np.array(rows, dtype=np.int32).T)
        steps = self._passes.steps(self._steps, columns, self._rule, sampled=sampled, truncated=truncated)
        every, ids, entropies, bad = steps.made.tolist(), steps.ids.tolist(), steps.entropies.tolist(), steps.bad
        results: list[Result] = []
        ahead: list[int] = []
        for at, (sequence, made, scanned) in enumerate(zip(sequences, every, steps.scanned.tolist(), strict=True)):
            plan, ledger = sequence.plan, sequence.ledger
            assert plan is not None
            ledger.decoder += made
            ledger.patcher += scanned
            if self._fed or not plan.draft:
                ledger.encoder += made - 1
                sequence.encoded = plan.start + made
            result = Result(ids[at][:made], more=made - 1, bad=bool(bad[at]))
            if scanned:
                result.entropies = entropies[at][:scanned]
            elif plan.draft and made == plan.repeat and plan.scan_to > sequence.scanned:
                ahead.append(at)
            results.append(result)
        self._count(steps.made, steps.scanned, columns[OPENED] >= 0)
        self._scan_ahead(sequences, ahead, results)
        return results

    def decode(self, sequences: list[Sequence]) -> list[Result]:
        """The plans of sequences of which there is nothing to say but ids, in one call; of blocks, all steps."""
        batch = lay_out(sequences, self._columns)
        plans = [sequence.plan for sequence in sequences if sequence.plan is not None]
        asked = np.ones((6, len(plans)), dtype=np.int32)
        ends, selects, sizes, rules, lasts, mosts = asked
        bounds = np.zeros(len(plans), dtype=np.float32)
        ends[:] = [plan.rows for plan in plans]
        np.cumsum(ends, out=ends)
        selects[:], sizes[:] = batch.selects, [len(plan.block_ids) for plan in plans]
        ends -= sizes
        if batch.in_block is not None:
            steps = [plan.unmask or _NO_STEP for plan in plans]
            rules[:], bounds[:] = [step.rule for step in steps], [step.bound for step in steps]
            lasts[:], mosts[:] = [step.left or 0 for step in steps], [plan.repeat for plan in plans]
        sampled, truncated, _ = self._chooser.needs(sequences)
        decoded = self._passes.decode_steps(
            self._decoder_steps,
            batch.columns,
            Plans(ends, selects, sizes, rules, lasts, mosts, bounds),
            sampled=sampled,
            truncated=truncated,
        )
        chosen, blocks, every = decoded.chosen.tolist(), decoded.ids.tolist(), decoded.steps.tolist()
        results = [Result(steps=steps) for steps in every]
        ahead: list[int] = []
        for at, (sequence, plan, result) in enumerate(zip(sequences, plans, results, strict=True)):
            if plan.select:
                ids = chosen[at]
                result.accepted = agreeing(ids, sequence.draft[: plan.select - 1])
                result.ids = ids[: result.accepted + 1]
            if plan.block_ids:
                block = result.block_ids = blocks[at][: len(plan.block_ids)]
                result.block_done = MASK_ID not in block
                # Its first pass was counted where its rows were laid out.
                sequence.ledger.decoder += result.steps - 1
            if plan.scan_to > sequence.scanned and (result.block_done or not plan.block_ids):
                ahead.append(at)
        if decoded.bad.any():
            for result, bad in zip(results, decoded.bad.tolist(), strict=True):
                result.bad = bad
        most = max(every)
        self._ledger.decoder += most
        self._work.append(("decoder", batch.total))
        self._work += [("decoder", int(sizes[decoded.steps > step].sum())) for step in range(1, most)]
        self._scan_ahead(sequences, ahead, results)
        return results

    def _scan_ahead(self, sequences: list[Sequence], ahead: list[int], results: list[Result]) -> None:
        """Entropies of new bytes that the next plans of some sequences need, into their results."""
        if ahead:
            those = [sequences[at] for at in ahead]
            ends = [s.plan.scan_to for s in those if s.plan]
            for at, values in zip(ahead, self._scan(those, ends), strict=True):
                results[at].entropies = values

    def _count(self, made: np.ndarray, scanned: np.ndarray, stays: np.ndarray) -> None:
        """The passes of single rows into ledger and work: of each step those who took part in it."""
        encoded = made - 1 if self._fed else np.where(stays, made - 1, 0)
        for module, each in (("decoder", made), ("patcher", scanned), ("encoder", encoded)):
            setattr(self._ledger, module, getattr(self._ledger, module) + int(each.max()))
        for kind, each in ((STEP, made[stays]), (DRAFT, made[~stays])):
            self._work += [
                (kind, rows) for rows in (each > np.arange(int(each.max(initial=0)))[:, None]).sum(1).tolist()
            ]
