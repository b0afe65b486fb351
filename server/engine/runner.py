"""From plans to staged integers, and from fetched results to outcomes (design §3).

The runner knows rows, patches and latents of sequences; it knows no methods, no HTTP and no scheduling, and leaves
tensors to `passes`. Every public call takes sequences in batch order, under `torch.inference_mode`. Rows are laid out
with array operations over the whole batch; what loops over requests takes a few integers from each.

Rows are padded where shapes must be few (`bucket`) and, in deterministic mode, to whole groups of 8: with at least 8
rows a linear map of torch's gives a row a result that does not depend on the others. Our own maps always do.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kernels.attention import TILE
from kernels.backend import use_triton
from kernels.decoder_steps import Plans
from kernels.multi_step import OPENED
from kernels.unmasking import ONE_STEP
from models.blt import Blt
from models.patching import PatchRule
from models.vocabulary import MASK_ID
from server.decoding.method import Unmask
from server.engine.caches import Caches
from server.engine.choosing import Batch, Chooser, Result
from server.engine.cost import DRAFT, STEP, Announce, Costs, measure, measure_steps
from server.engine.graphs import Graphs
from server.engine.passes import Passes, Patches, Rows
from server.engine.ranks import leader_of
from server.engine.scoring import Scored
from server.engine.sequence import Sequence
from server.engine.staging import Columns, Fetch, Staging
from server.request import MAX_DRAFT_LENGTH, Ledger
from server.settings import EngineSettings

#: A position that no request reaches.
_NEVER = 2**31 - 1

#: Of a plan without a block.
_NO_STEP = Unmask(ONE_STEP, 0.0)

#: Causal rows up to which a block's steps are one call: a prompt's are better shared out among the threads.
_FEW = 40

#: Requests up to which it is measured what steps of theirs cost; beyond, that goes on as a line.
MOST_STEPPING = 64

#: Passes of more rows are long enough to hide their launches.
MOST_CAPTURED = 256


def bucket(count: int) -> int:
    """The number of rows that `count` rows are padded to where a shape costs a compilation or a captured graph."""
    if count <= 8:
        return 8
    step = max(8, 1 << (count - 1).bit_length() - 3)
    return -(-count // step) * step


def agreeing(targets: abc.Sequence[int], drafted: abc.Sequence[int]) -> int:
    """How many drafted bytes are the targets, up to the first that is not: `kernels.verification` on the host."""
    count = 0
    for target, byte in zip(targets, drafted, strict=False):
        if target != byte:
            break
        count += 1
    return count


class Runner:
    def __init__(self, model: Blt, caches: Caches, settings: EngineSettings) -> None:
        self._caches = caches
        self._leader = leader_of(model)
        if self._leader is not None:
            self._leader.prepare(caches.groups["global"], caches.max_length, settings.deterministic)
        device = next(model.parameters()).device
        self._static = use_triton(device)
        state_rows = settings.max_running + 1
        self._passes = Passes(model, caches, state_rows, device, settings.deterministic)
        self._padded = settings.deterministic and not self._passes.row_invariant
        kinds = ("scan", "encode", "upstream", "decode", "picks", "blocks", "drafts", "tail", "score")
        self._staging = {kind: Staging(device) for kind in kinds}
        self._graphs = Graphs(device) if self._static else None
        self._fetch = Fetch()
        self._chooser = Chooser(state_rows, self._passes, self._columns, self._staging, device)
        self._multi_step = self._passes.multi_step(self._chooser.draws)
        self._decoder_steps = self._passes.decoder_steps(self._chooser.draws)
        patching = model.config.with_patching(settings.patching_threshold, settings.max_patch_length)
        self._rule = PatchRule(patching.patching_threshold, patching.max_patch_length)
        #: Whether drafted rows begin as encoder states.
        self._fed = model.config.decoder_input == "encoder"
        self.ledger = Ledger()
        #: Passes since they were last taken away: module and rows, padding included. Steps in one call count as such.
        self.work: list[tuple[str, int]] = []

    def costs(self, context: int, patches: int, counts: tuple[int, ...]) -> Costs:
        """Cost curves of the modules, at position `context` and patch `patches`, at ascending row counts."""
        announce: Announce | None = None
        if self._leader is not None:
            announce = partial(self._leader.announce, group=self._caches.groups["global"])
        costs = measure(self._passes, context, patches, counts, announce=announce)
        if self._multi_step is not None:
            run = partial(self._passes.steps, self._multi_step, sampled=False, truncated=False)
            # What they write lies within the longest request.
            context = min(context, self._caches.max_length - MAX_DRAFT_LENGTH)
            costs |= measure_steps(run, context, [count for count in counts if count <= MOST_STEPPING])
        return costs

    @property
    def copies(self) -> int:
        """Copies from the device to the host so far."""
        return self._fetch.copies

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence that was given a state row."""
        self._passes.write_prompt(sequence.row, sequence.ids)
        self._chooser.admit(sequence)

    def commit(self, sequence: Sequence, ids: abc.Sequence[int]) -> None:
        """Count fixed ids for penalties."""
        self._chooser.commit(sequence, ids)

    def scan(self, sequences: list[Sequence], until: list[int]) -> list[list[float]]:
        """Entropy model over rows [scanned, until): the entropies in nats, a list a sequence."""
        spans, entropies = self._causal(
            "scan", self._passes.entropies, sequences, [s.scanned for s in sequences], until
        )
        (flat,) = self._fetch(entropies)
        self.ledger.patcher += 1
        for sequence in sequences:
            sequence.ledger.patcher += 1
        return _split(flat, spans)

    def encode(self, sequences: list[Sequence], until: list[int]) -> None:
        """Encoder over rows [encoded, until); the states go to their store."""
        self._causal("encode", self._passes.encode, sequences, [s.encoded for s in sequences], until)
        self.ledger.encoder += 1
        for sequence, end in zip(sequences, until, strict=True):
            sequence.ledger.encoder += 1
            sequence.encoded = end

    def upstream(self, sequences: list[Sequence]) -> None:
        """Pooling and global transformer over every pending patch; latents go to fresh slots of their store."""
        numbers: list[tuple[int, int, int, int, int]] = []
        longest = 0
        spans: list[tuple[int, int]] = []
        take = self._caches.latent_pool.take
        for sequence in sequences:
            row, waiting = sequence.row, sequence.pending_patches()
            spans.append((len(numbers), len(waiting)))
            for patch in waiting:
                patch.slot = take()
                longest = max(longest, patch.end - patch.start + 1)
                numbers.append((row, patch.index, patch.start, patch.end, patch.slot))
            sequence.ledger.global_ += 1
        total = len(numbers)
        columns = self._columns("upstream", 6, total)
        columns[:5, :total] = np.array(numbers, dtype=np.int32).T
        owners, index, starts, ends, latents, highs = columns
        np.add(index, 1, out=highs)
        if self._padded:
            longest = -(-longest // TILE) * TILE
        elif self._static:
            longest = bucket(longest)
        self._caches.send_tables()
        every = _with_padding(spans, total, columns.shape[1])
        if self._leader is not None:
            self._leader.announce(columns[[0, 1, 5]], every, self._caches.groups["global"])
        owners, index, starts, ends, latents, highs = self._staging["upstream"].send_each()
        rows = Rows(owners, index, index, highs, every)
        self._passes.upstream(Patches(rows, starts, ends, latents, longest))
        self.work.append(("global", columns.shape[1]))
        self.ledger.global_ += 1

    @property
    def steps(self) -> bool:
        """Whether plans may go on by themselves: `Plan.repeat`."""
        return self._multi_step is not None

    def decode(self, sequences: list[Sequence]) -> list[Result]:
        """One decoder pass over the plans of ready sequences, and the choice of their bytes; of those that go on by
        themselves, all passes.

        At its tail the entropy model runs over those of the new bytes that the next plans are sure to need.
        """
        by_call: dict[Callable[[list[Sequence]], list[Result]], list[int]] = {}
        for at, sequence in enumerate(sequences):
            by_call.setdefault(self._call_for(sequence), []).append(at)
        if len(by_call) == 1:
            return next(iter(by_call))(sequences)
        results: dict[int, Result] = {}
        for call, own in by_call.items():
            results |= zip(own, call([sequences[at] for at in own]), strict=True)
        return [results[at] for at in range(len(sequences))]

    def _call_for(self, sequence: Sequence) -> Callable[[list[Sequence]], list[Result]]:
        plan = sequence.plan
        assert plan is not None
        if plan.repeat > 1 and not plan.block_ids:
            return self._go_on
        if self._decoder_steps is None or sequence.penalizes or not sequence.plain or plan.causal > _FEW:
            return self._decode
        return self._decode_plain

    def _go_on(self, sequences: list[Sequence]) -> list[Result]:
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
        assert self._multi_step is not None
        steps = self._passes.steps(self._multi_step, columns, self._rule, sampled=sampled, truncated=truncated)
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

    def _decode_plain(self, sequences: list[Sequence]) -> list[Result]:
        """The plans of sequences of which there is nothing to say but ids, in one call; of blocks, all steps."""
        batch = _lay_out(sequences, self._columns)
        assert self._decoder_steps is not None
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
        self.ledger.decoder += most
        self.work.append(("decoder", batch.total))
        self.work += [("decoder", int(sizes[decoded.steps > step].sum())) for step in range(1, most)]
        self._scan_ahead(sequences, ahead, results)
        return results

    def _scan_ahead(self, sequences: list[Sequence], ahead: list[int], results: list[Result]) -> None:
        """Entropies of new bytes that the next plans of some sequences need, into their results."""
        if ahead:
            those = [sequences[at] for at in ahead]
            ends = [s.plan.scan_to for s in those if s.plan]
            for at, values in zip(ahead, self.scan(those, ends), strict=True):
                results[at].entropies = values

    def _count(self, made: np.ndarray, scanned: np.ndarray, stays: np.ndarray) -> None:
        """The passes of single rows into ledger and work: of each step those who took part in it."""
        encoded = made - 1 if self._fed else np.where(stays, made - 1, 0)
        for module, each in (("decoder", made), ("patcher", scanned), ("encoder", encoded)):
            setattr(self.ledger, module, getattr(self.ledger, module) + int(each.max()))
        for kind, each in ((STEP, made[stays]), (DRAFT, made[~stays])):
            self.work += [
                (kind, rows) for rows in (each > np.arange(int(each.max(initial=0)))[:, None]).sum(1).tolist()
            ]

    def _decode(self, sequences: list[Sequence]) -> list[Result]:
        """One decoder pass over the plans, each once."""
        batch = _lay_out(sequences, self._columns)
        spans, with_blocks = _with_padding(batch.spans, batch.total, batch.padded), batch.in_block is not None

        def run(columns: Columns) -> Tensor:
            owners, positions, firsts, highs, latents, block = columns
            rows = Rows(owners, positions, firsts, highs, spans)
            return self._passes.decode(rows, latents, block if with_blocks else None)

        states = self._launch("decode", run, spans, with_blocks)
        self.work.append(("decoder", batch.padded))
        self.ledger.decoder += 1
        plain = all(sequence.plain for sequence in sequences)
        staged = self._chooser.stage(sequences, batch, plain)
        tensors = self._chooser.choose(states, staged)
        scored = None if plain else Scored.of(sequences, batch.spans)
        scores = self._score(states, scored) if scored is not None else []
        ahead = [sequences[at] for at in batch.ahead]
        if not ahead:
            fetched = self._fetch(*scores, *tensors) if scores or staged.total else []
            results = staged.results(fetched[len(scores) :])
        else:
            begins, ends = [s.scanned for s in ahead], [s.plan.scan_to for s in ahead if s.plan]
            tail, entropies = self._causal("tail", self._passes.entropies, ahead, begins, ends)
            *fetched, flat = self._fetch(*scores, *tensors, entropies)
            self.ledger.patcher += 1
            results = staged.results(fetched[len(scores) :])
            for at, values in zip(batch.ahead, _split(flat, tail), strict=True):
                results[at].entropies = values
                sequences[at].ledger.patcher += 1
        if scored is not None:
            for at, own in scored.take(fetched[: len(scores)], sequences).items():
                results[at].scores = own
        return results

    def _score(self, states: torch.Tensor, scored: Scored) -> list[torch.Tensor]:
        """What is to be fetched for the scores of a prompt's rows in a pass."""
        count = len(scored.rows)
        columns = self._columns("score", 2, count)
        columns[0, :count], columns[1, :count] = scored.rows, scored.targets
        rows, targets = self._staging["score"].send_each()
        return scored.tensors(self._passes.logits(states, rows)[:count], targets[:count].long())

    # Rows

    def _causal(
        self,
        kind: str,
        function: Callable[[Rows], Tensor],
        sequences: list[Sequence],
        begins: list[int],
        ends: list[int],
    ) -> tuple[list[tuple[int, int]], Tensor]:
        """A pass over causal rows [begin, end) of every sequence: their spans in it, and its result."""
        rows: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        total = 0
        for sequence, begin, end in zip(sequences, begins, ends, strict=True):
            count = end - begin
            if count == 1:
                rows.append(sequence.row)
                positions.append(begin)
            else:
                rows += [sequence.row] * count
                positions += range(begin, end)
            spans.append((total, count))
            total += count
        columns = self._columns(kind, 3, total)
        columns[:2, :total] = rows, positions
        np.add(columns[1], 1, out=columns[2])
        every = _with_padding(spans, total, columns.shape[1])
        self.work.append(("encoder" if kind == "encode" else "patcher", columns.shape[1]))

        def run(columns: Columns) -> Tensor:
            owners, positions, highs = columns
            return function(Rows(owners, positions, positions, highs, every))

        return spans, self._launch(kind, run, every)

    def _launch(
        self, kind: str, run: Callable[[Columns], Tensor], spans: list[tuple[int, int]], with_blocks: bool = False
    ) -> Tensor:
        """Run a function of the staged columns, replaying its graph where shapes are few and launches many."""
        self._caches.send_tables()
        staging = self._staging[kind]
        if self._graphs is None:
            return run(staging.send_each())
        columns = staging.send()
        size = columns.shape[1]
        if size > MOST_CAPTURED:
            return run(columns.unbind())
        # Attention's tiles follow from the longest span.
        key = (kind, size, with_blocks, bucket(max(n for _, n in spans)))
        return self._graphs.run(key, columns, lambda sent: run(sent.unbind()))

    def _columns(self, kind: str, count: int, size: int) -> np.ndarray:
        """Staged int32 columns [count, size and padding]; what pads them names the null row, page and latent."""
        padded = size
        if self._static:
            padded = bucket(size)
        elif self._padded:
            padded = max(8, -(-size // 8) * 8)
        columns = self._staging[kind].columns(count, padded)
        if padded > size:
            columns[:, size:] = 0
        return columns


def _lay_out(sequences: list[Sequence], allocate: Callable[[str, int, int], np.ndarray]) -> Batch:
    """The rows of the sequences' plans, into columns: owner, position, first, high, latent, and block id or -1."""
    # Of every run of adjacent rows that read the same latent: state row, position of the pass's row 0 if it belonged to
    # the run, latent, what `first` is at most and `high` at least, and the position from which on rows are picked.
    runs: list[tuple[int, ...]] = []
    sizes: list[int] = []
    spans: list[tuple[int, int]] = []
    block_ids: list[int] = []
    ahead: list[int] = []
    total = picks = 0
    firsts: list[int] = []
    selects: list[int] = []
    for at, sequence in enumerate(sequences):
        plan, patches = sequence.plan, sequence.patches
        assert plan is not None
        row, shift, causal, end = sequence.row, plan.start - total, plan.causal, plan.end
        newest = latent = patches[-1].slot if patches else 0
        if plan.provisional and sequence.provisional is not None:
            newest = sequence.provisional.slot
            if plan.draft:
                latent = newest
        if causal > 1 and len(patches) > 1:
            # Each reads the newest patch that is closed at its position.
            done, latent = plan.start, patches[0].slot
            for patch in islice(patches, 1, None):
                if done < patch.end < end:
                    runs.append((row, shift, latent, _NEVER, 0, end - plan.select))
                    sizes.append(patch.end - done)
                    done = patch.end
                if patch.end < end:
                    latent = patch.slot
            runs.append((row, shift, latent, _NEVER, 0, end - plan.select))
            sizes.append(end - done)
        elif causal:
            runs.append((row, shift, latent, _NEVER, 0, end - plan.select))
            sizes.append(causal)
        if plan.block_ids:
            block_ids += plan.block_ids
            runs.append((row, shift, newest, end, plan.start + plan.rows, _NEVER))
            sizes.append(len(plan.block_ids))
        spans.append((total, plan.rows))
        firsts.append(picks)
        selects.append(plan.select)
        if plan.scan_to > sequence.scanned and (plan.unmask is None or plan.unmask.fills):
            ahead.append(at)
        sequence.ledger.decoder += 1
        total += plan.rows
        picks += plan.select
    columns = allocate("decode", 6, total)
    owner, position, first, high, latents, block = columns[:, :total]
    numbers = np.array(runs, dtype=np.int32)
    owner[:], shifts, latents[:], first[:], high[:], selected = (
        numbers if total == len(runs) else numbers.repeat(sizes, axis=0)
    ).T
    np.add(shifts, np.arange(total, dtype=np.int32), out=position)
    in_block = None
    columns[5] = -1
    if block_ids:
        in_block = first != _NEVER
        block[in_block] = block_ids
    np.minimum(first, position, out=first)
    np.maximum(high, position + 1, out=high)
    # Padding sees the null row's first position.
    columns[3, total:] = 1
    picked = np.flatnonzero(position >= selected)
    return Batch(
        columns, owner, position, block, picked, firsts, selects, ahead, in_block, spans, total, columns.shape[1]
    )


def _with_padding(spans: list[tuple[int, int]], total: int, padded: int) -> list[tuple[int, int]]:
    return spans + [(i, 1) for i in range(total, padded)] if padded > total else spans


def _split(flat: np.ndarray, spans: list[tuple[int, int]]) -> list[list[float]]:
    values: list[float] = flat.tolist()
    return [values[first : first + count] for first, count in spans]
