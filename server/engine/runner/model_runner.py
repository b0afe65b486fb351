"""Runs the modules for a batch: stages its rows, launches the passes and returns the results (design §3).

The runner knows rows, patches and latents of sequences. It knows no methods and no scheduling, and leaves tensors to
`ModuleForward`. Every public call is made under `torch.inference_mode`. Rows are laid out with array operations over
the whole batch; a loop over requests takes only a few integers from each.

Rows are padded where shapes must be few (`bucket`) and, in deterministic mode, to whole groups of 8: with at least 8
rows a linear map of torch's gives a row a result that does not depend on the others. Our own C maps always do.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.attention import TILE
from fastblt.kernels.cpu.decoder_steps import DecoderSteps
from fastblt.kernels.cpu.multi_step import MultiStep
from fastblt.kernels.cpu.upstream import PatchRows
from fastblt.models.blt import Blt
from fastblt.models.patching import PatchRule
from fastblt.server.decoding.method import Plan
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.device.cost import Announce, Costs, measure, measure_filters, measure_steps
from fastblt.server.engine.device.forward import ModuleForward, Patches, Rows
from fastblt.server.engine.device.passes import BYTES_A_PATCH, MOST_CAPTURED, Passes, captured_size, is_captured
from fastblt.server.engine.device.ranks import leader_of
from fastblt.server.engine.device.rounds import PlanRounds, RoundPasses, RowRounds
from fastblt.server.engine.device.staging import Fetch, Part, Staging
from fastblt.server.engine.runner.batch import bucket, build_batch, split, with_padding
from fastblt.server.engine.runner.fused_steps import FusedSteps
from fastblt.server.engine.runner.prompt_logprobs import TENSORS, ScoredRows
from fastblt.server.engine.runner.sampler import Result, Sampler
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.request import MAX_BLOCK_SIZE, MAX_DRAFT_LENGTH, Ledger
from fastblt.server.settings import EngineSettings

#: Most causal rows of a plan that takes part in fused steps: the rows of a prompt are better shared among threads.
_FEW = 40

#: Most requests for which the cost of fused steps is measured; beyond, the curve goes on as a straight line.
MOST_STEPPING = 64
#: Numbers of requests for which filtered drafts are measured: a call of many takes so much longer than the others.
_FILTERING = (1, 4, 16)

#: Most rows of one plan that is no chunk of a prompt, and a bound of the integers of a row.
_MOST_ROWS, _WORDS_A_ROW = MAX_DRAFT_LENGTH + MAX_BLOCK_SIZE + 1, 24


class ModelRunner:
    def __init__(self, model: Blt, caches: KvCaches, settings: EngineSettings) -> None:
        self._caches = caches
        self._leader = leader_of(model)
        if self._leader is not None:
            self._leader.prepare(caches.groups["global"], caches.max_length, settings.deterministic)
        self._queue = queue = caches.queue
        device = queue.device
        #: Rows are padded to buckets, and passes captured.
        self._static = queue.apart
        state_rows = settings.max_running + 1
        self._forward = ModuleForward(model, caches, state_rows, device, settings.deterministic)
        self._padded = settings.deterministic and not self._forward.row_invariant
        most_rows = bucket(settings.max_pass_rows + settings.max_running * _MOST_ROWS)
        self._staging = Staging(queue, _WORDS_A_ROW * most_rows + 2 * caches.tables.host.size)
        self._fetch = Fetch()
        self._sampler = Sampler(state_rows, self._forward, self._columns, queue)
        self.ledger = Ledger()
        #: Passes since the engine last cleared it: (module, rows with padding). Fused steps have kinds of their own.
        self.work: list[tuple[str, int]] = []
        self._block_sizes = model.config.block_sizes
        #: C calls that make several passes each; None where the model or the device has none.
        self.fused_steps: FusedSteps | None = None
        draws = self._sampler.draws
        #: Passes over rows at one address, on a device apart.
        self._passes: Passes | None = None
        steps: MultiStep | RowRounds | None
        decoder_steps: DecoderSteps | PlanRounds | None
        if queue.apart:
            self._passes = Passes(self._forward, draws, most_rows)
            own = RoundPasses(self._passes, self._forward.ids, encoder_input=self._forward.encoder_input)
            steps = RowRounds(queue, self._staging, self._fetch, own, self._send)
            decoder_steps = PlanRounds(queue, self._staging, self._fetch, own, self._send)
        else:
            steps, decoder_steps = self._forward.multi_step(draws), self._forward.decoder_steps(draws)
        if steps is not None and decoder_steps is not None:
            patching = model.config.with_patching(settings.patching_threshold, settings.max_patch_length)
            rule = PatchRule(patching.patching_threshold, patching.max_patch_length)
            self.fused_steps = FusedSteps(
                self._forward, steps, decoder_steps, self._sampler, rule, self.ledger, self.work
            )

    def costs(self, context: int, patches: int, counts: tuple[int, ...]) -> Costs:
        """Cost curves of the modules, at position `context` and patch `patches`, at ascending row counts."""
        announce: Announce | None = None
        if self._leader is not None:
            announce = partial(self._leader.announce, group=self._caches.groups["global"])
        costs = measure(self._forward, context, patches, counts, announce=announce)
        if self.fused_steps is not None:
            # A measured draft has a row at `context` and one for each of its bytes: all must lie within the longest
            # request, since where the null request's page table ends, another request's begins.
            context = min(context, self._caches.max_length - (1 + MAX_DRAFT_LENGTH))
            counts = tuple(count for count in counts if count <= MOST_STEPPING)
            costs |= measure_steps(self.fused_steps.time, context, counts)
            if self._passes is None:
                sizes = [size for size in self._block_sizes if 1 < size <= MAX_DRAFT_LENGTH // 2]
                patcher = costs["patcher"]

                def behind(count: int) -> float:
                    """Of the entropy model's pass over whole drafts."""
                    return patcher(count * (MAX_DRAFT_LENGTH + 1))

                costs |= measure_filters(self.fused_steps.time_filter, context, _FILTERING, sizes, behind)
        return costs

    def capture(self, say: Callable[[str], None]) -> int:
        """Capture every pass that a device apart replays; returns how many graphs that made."""
        return 0 if self._passes is None else self._passes.capture(say, upstream=self._leader is None)

    @property
    def copies(self) -> int:
        """Copies from the device to the host so far."""
        return self._fetch.copies

    def begin_step(self) -> None:
        """Before a step may copy or give away pages: passes that read them and wait go first."""
        self._staging.flush()

    def admit(self, sequence: Sequence) -> None:
        """Take a newly admitted sequence: its ids and its sampling parameters."""
        write = self._forward.write_prompt(sequence.state_index, sequence.ids)
        self._queue.run(write)
        self._sampler.admit(sequence)

    def commit(self, sequence: Sequence, ids: abc.Sequence[int]) -> None:
        """Count final ids, for penalties."""
        self._sampler.commit(sequence, ids)

    def scan(self, sequences: list[Sequence], until: list[int]) -> list[list[float]]:
        """Entropy model over rows [scanned, until) of each sequence: a list of entropies (nats) for each."""
        spans, run = self._causal("scan", self._forward.entropies, sequences, [s.scanned for s in sequences], until)
        self._send()
        (flat,) = self._fetch(self._queue.run(run))
        self.ledger.patcher += 1
        for sequence in sequences:
            sequence.ledger.patcher += 1
        return split(flat, spans)

    def encode(self, sequences: list[Sequence], until: list[int]) -> None:
        """Encoder over rows [encoded, until) of each sequence; the states stay in the cache."""
        _, run = self._causal("encode", self._forward.encode, sequences, [s.encoded for s in sequences], until)
        rows = self.work[-1][1]
        self._give(run, captured=self._static and rows <= MOST_CAPTURED)
        self.ledger.encoder += 1
        for sequence, end in zip(sequences, until, strict=True):
            sequence.ledger.encoder += 1
            sequence.encoded = end

    def upstream(self, sequences: list[Sequence]) -> None:
        """Pooling and global transformer over every pending patch; each gets a fresh latent slot."""
        numbers: list[tuple[int, ...]] = []
        longest = 0
        spans: list[tuple[int, int]] = []
        take = self._caches.latent_pool.take
        for sequence in sequences:
            state_index, waiting = sequence.state_index, sequence.pending_patches()
            spans.append((len(numbers), len(waiting)))
            for patch in waiting:
                patch.slot = take()
                longest = max(longest, patch.end - patch.start + 1)
                numbers.append((state_index, patch.index, patch.start, patch.end, patch.slot, patch.index + 1))
            sequence.ledger.global_ += 1
        total = len(numbers)
        self._staging.begin()
        part = self._columns(8 if self._static else 6, total)
        columns = part.host[:6]
        columns[:, :total] = list(zip(*numbers, strict=True))
        # A padding row attends to the first position of the null request.
        columns[5, total:] = 1
        if self._padded:
            longest = -(-longest // TILE) * TILE
        every = with_padding(spans, total, columns.shape[1])
        if self._leader is not None:
            self._leader.announce(columns[[0, 1, 5]], every, self._caches.groups["global"])
        sent = self._stage_bytes(part, total) if self._static else None
        longest_patch = longest

        def run() -> None:
            if self._passes is not None and sent is not None and self._leader is None:
                self._passes.upstream(*sent)
                return
            owners, index, starts, ends, latents, highs = part.each[:6]
            rows = Rows(owners, index, index, highs, every)
            inside = PatchRows(*sent[1].unbind(), *part.each[6:]) if sent is not None else None
            self._forward.upstream(Patches(rows, starts, ends, latents, longest_patch, inside))

        captured = self._leader is None and sent is not None and is_captured(*sent)
        self._give(run, captured=captured)
        self.work.append(("global", columns.shape[1]))
        self.ledger.global_ += 1

    def _stage_bytes(self, part: Part, count: int) -> tuple[Tensor, Tensor]:
        """Stage the bytes of an upstream pass's patches, as `Passes.upstream` takes both."""
        owners, _, starts, ends, _, _, firsts, counts = part.host[:, :count]
        np.subtract(ends + 1, starts, out=counts)
        np.subtract(counts.cumsum(dtype=np.int32), counts, out=firsts)
        # A padding patch has one byte, whichever.
        part.host[6:, count:] = np.array([[0], [1]])
        total, room = int(counts.sum()), BYTES_A_PATCH * part.host.shape[1]
        inside = self._staging.take(2, room) if total <= room else self._columns(2, total)
        inside.host[:, total:] = 0
        inside.host[0, :total] = owners.repeat(counts)
        np.subtract(np.arange(total, dtype=np.int32), (firsts - starts).repeat(counts), out=inside.host[1, :total])
        return part.tensor, inside.tensor

    def decode(self, planned: list[Planned]) -> list[Result]:
        """Carry out the plans of one decoder pass, and choose its bytes. Results are in the order of the batch.

        Plans that may go on by themselves take all their passes here (`FusedSteps`). Where the next plans are sure to
        need the entropies of the new bytes, the entropy model runs too.
        """
        calls = [self._call_for(sequence, plan) for sequence, plan in planned]
        first = calls[0]
        if all(call == first for call in calls):
            return first(planned)
        results: dict[int, Result] = {}
        for call in dict.fromkeys(calls):
            own = [at for at, other in enumerate(calls) if other == call]
            results |= zip(own, call([planned[at] for at in own]), strict=True)
        return [results[at] for at in range(len(planned))]

    def fuses(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether the pass of a plan, the encoder's before it and the choice of its bytes are one call.

        Blocks of a request with masks are not: what fills one position decides what may fill the next.
        """
        if self.fused_steps is None or plan.causal > _FEW:
            return False
        return sequence.fusable or (sequence.masked and not plan.block_ids and not self._static)

    def _call_for(self, sequence: Sequence, plan: Plan) -> Callable[[list[Planned]], list[Result]]:
        if self.fused_steps is None or not self.fuses(sequence, plan):
            return self._decode
        rows_alone = plan.repeat > 1 and not plan.block_ids and not plan.next_length
        return self.fused_steps.run_rows if rows_alone else self.fused_steps.run_plans

    def _decode(self, planned: list[Planned]) -> list[Result]:
        """One decoder pass, each plan once."""
        self._staging.begin()
        batch = build_batch(planned, self._columns)
        spans, with_blocks = with_padding(batch.spans, batch.total, batch.padded), batch.in_block is not None
        ids_only = all(sequence.ids_only for sequence, _ in planned)
        scored = None if ids_only else ScoredRows.of(planned, batch.spans)
        # A captured graph computes all of its rows.
        asked = None if self._static else batch.needed_rows(scored.rows if scored is not None else [])
        read = None if asked is None else torch.from_numpy(asked)
        staged = self._sampler.stage(planned, batch, ids_only)
        score = self._stage_scores(scored) if scored is not None else None

        def run() -> list[Tensor]:
            owners, positions, highs, firsts, latents, block = batch.part.each
            rows = Rows(owners, positions, firsts, highs, spans)
            states = self._forward.decode(rows, latents, block if with_blocks else None, read)
            scores = score(states) if score is not None else []
            return [*scores, *self._sampler.choose(states, staged)]

        self._send()
        results_there = self._queue.run(run)
        self.work.append(("decoder", batch.padded))
        self.ledger.decoder += 1
        ahead = [planned[at] for at in batch.ahead]
        scores = TENSORS if scored is not None else 0
        if not ahead:
            fetched = self._fetch(results_there) if scores or staged.total else []
            results = staged.results(fetched[scores:])
        else:
            begins, ends = [s.scanned for s, _ in ahead], [plan.scan_to for _, plan in ahead]
            tail, run_tail = self._causal("tail", self._forward.entropies, [s for s, _ in ahead], begins, ends)
            self._send()
            entropies = self._queue.run(run_tail)
            both = self._queue.run(lambda: [*results_there.take(), *entropies.take()])
            *fetched, flat = self._fetch(both)
            self.ledger.patcher += 1
            results = staged.results(fetched[scores:])
            for at, values in zip(batch.ahead, split(flat, tail), strict=True):
                results[at].entropies = values
                planned[at][0].ledger.patcher += 1
        if scored is not None:
            for at, own in scored.take(fetched[:scores], planned).items():
                results[at].scores = own
        return results

    def _stage_scores(self, scored: ScoredRows) -> Callable[[Tensor], list[Tensor]]:
        """Stages the scores of prompts' rows in a pass; from its states the tensors to fetch for them."""
        count = len(scored.rows)
        part = self._columns(2, count)
        part.host[0, :count], part.host[1, :count] = scored.rows, scored.targets

        def tensors(states: Tensor) -> list[Tensor]:
            rows, targets = part.each
            return scored.tensors(self._forward.logits(states, rows)[:count], targets[:count].long())

        return tensors

    # Rows

    def _causal(
        self,
        kind: str,
        function: Callable[[Rows], Tensor],
        sequences: list[Sequence],
        begins: list[int],
        ends: list[int],
    ) -> tuple[list[tuple[int, int]], Callable[[], list[Tensor]]]:
        """Stages a pass of one module over causal rows [begin, end) of every sequence: the spans of their rows, and
        the pass."""
        rows: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        total = 0
        for sequence, begin, end in zip(sequences, begins, ends, strict=True):
            count = end - begin
            if count == 1:
                rows.append(sequence.state_index)
                positions.append(begin)
            else:
                rows += [sequence.state_index] * count
                positions += range(begin, end)
            spans.append((total, count))
            total += count
        self._staging.begin()
        part = self._columns(3, total)
        columns = part.host
        columns[:2, :total] = rows, positions
        np.add(columns[1], 1, out=columns[2])
        every = with_padding(spans, total, columns.shape[1])
        self.work.append(("encoder" if kind == "encode" else "patcher", columns.shape[1]))

        def run() -> list[Tensor]:
            if self._passes is not None:
                size = self._passes.enter(part.tensor)
                return [self._passes.encode(size) if kind == "encode" else self._passes.scan(size)]
            owners, positions, highs = part.each
            return [function(Rows(owners, positions, positions, highs, every))]

        return spans, run

    def _send(self) -> None:
        """Send what was staged, and what changed in the page tables."""
        self._stage_tables()
        self._staging.send()

    def _give(self, work: Callable[[], object], *, captured: bool) -> None:
        """Give a pass whose results the host does not need to the device. A captured one allocates nothing, so it
        cannot fail later, under another pass: it waits for the next copy."""
        if captured:
            self._stage_tables()
            self._staging.then(work)
        else:
            self._send()
            self._queue.run(work)

    def _stage_tables(self) -> None:
        """Stage what changed in the page tables."""
        if (changes := self._caches.tables.changes()) is None:
            return
        part = self._staging.take(*changes.shape)
        part.host[:] = changes
        table = self._caches.tables.device.view(-1)

        def enter() -> None:
            places, pages = part.each
            table.index_put_((places.long(),), pages)

        self._staging.then(enter)

    def _columns(self, count: int, size: int) -> Part:
        """int32 columns [count, size with padding]. Padding is 0: the null state, page and latent."""
        padded = size
        if self._static:
            padded = captured_size(size) if size <= MOST_CAPTURED else bucket(size)
        elif self._padded:
            padded = max(8, -(-size // 8) * 8)
        part = self._staging.take(count, padded)
        if padded > size:
            part.host[:, size:] = 0
        return part
