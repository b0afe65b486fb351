"""From decoder states to bytes: the requests' sampling parameters, and a pass's calls of the selection kernels."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.noise import mix_seed
from fastblt.kernels.selection import select
from fastblt.kernels.types import SelectionParams, Unmasked
from fastblt.kernels.unmasking import unmask
from fastblt.kernels.verification import verify
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.staging import Part
from fastblt.server.engine.device_queue import DeviceQueue
from fastblt.server.engine.runner.batch import Batch
from fastblt.server.engine.runner.masks import Masks, part
from fastblt.server.engine.runner.samples import BlockSamples, CausalSamples, Result
from fastblt.server.engine.sequence import Planned, Sequence

#: A position that no request reaches.
_NEVER = 2**62


class Sampler:
    """Sampling parameters of every running request, on the device by state index; chooses the bytes of passes."""

    def __init__(
        self,
        num_states: int,
        forward: ModuleForward,
        allocate: Callable[[int, int], Part],
        queue: DeviceQueue,
    ) -> None:
        self._forward = forward
        self._allocate = allocate
        self._queue = queue
        self._device = device = queue.device
        # Temperature, top-p, min-p, repetition, presence, frequency; top-k and seed.
        self._values = torch.zeros(6, num_states, device=device)
        self._values[[1, 3]] = 1.0
        self._integers = torch.zeros(2, num_states, dtype=torch.int64, device=device)
        self._null: dict[int, tuple[Tensor, ...]] = {}
        self._bias = torch.zeros(num_states, VOCAB_SIZE, device=device)
        self._counts = torch.zeros(num_states, VOCAB_SIZE, dtype=torch.int32, device=device)
        self._prompt_seen = torch.zeros(num_states, VOCAB_SIZE, dtype=torch.bool, device=device)
        # So that a pass need not ask every request: state indexes that draw, truncate and have penalties, and the
        # position from which on EOS may stand.
        self._needs: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        self._eos_from = np.zeros(num_states, dtype=np.int64)
        # The null request, whose steps are measured, never ends.
        self._eos_from[0] = _NEVER
        here = torch.from_numpy(self._eos_from)
        self._eos_there = here.to(device, copy=True) if queue.apart else here

    def admit(self, sequence: Sequence) -> None:
        """Store the parameters of a sequence, and count the bytes it has already produced."""
        state_index, params = sequence.state_index, sequence.params
        for states, needed in zip(self._needs, (not params.greedy, params.truncates, params.penalizes), strict=True):
            (states.add if needed else states.discard)(state_index)
        self._eos_from[state_index] = _NEVER if params.ignore_eos else sequence.prompt_length + params.min_tokens
        values = torch.tensor(
            [
                0.0 if params.greedy else params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            ]
        )
        integers = torch.tensor([params.top_k, mix_seed(sequence.seed, sequence.request.choice)])
        eos_from = int(self._eos_from[state_index])
        bias, prompt = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        if params.penalizes:
            bias, prompt = torch.zeros(VOCAB_SIZE), torch.tensor(sequence.ids[: sequence.prompt_length])
            for token, value in params.logit_bias.items():
                bias[token] = value

        def write() -> None:
            self._values[:, state_index] = values.to(self._device)
            self._integers[:, state_index] = integers.to(self._device)
            self._eos_there[state_index] = eos_from
            # Also without penalties: the state's last owner may have had some, and another request of a pass may.
            self._bias[state_index] = bias.to(self._device) if len(bias) else 0.0
            self._counts[state_index] = 0
            self._prompt_seen[state_index] = False
            if len(prompt):
                self._prompt_seen[state_index, prompt.to(self._device)] = True

        self._queue.run(write)
        if params.penalizes:
            self.commit(sequence, sequence.ids[sequence.prompt_length :])

    def commit(self, sequence: Sequence, ids: abc.Sequence[int]) -> None:
        """Count produced ids, for penalties."""
        if sequence.params.penalizes and ids:
            counts = torch.from_numpy(np.bincount(ids, minlength=VOCAB_SIZE).astype(np.int32))
            state_index = sequence.state_index

            def count() -> None:
                self._counts[state_index] += counts.to(self._device)

            self._queue.run(count)

    @property
    def draws(self) -> Draws:
        """How bytes without penalties are drawn, by state index: what the fused steps need."""
        return Draws(self._values, self._integers, self._eos_there)

    def needs(self, planned: list[Planned]) -> tuple[bool, ...]:
        """Whether one of the sequences draws, whether one truncates, whether one has penalties."""
        state_indexes = [sequence.state_index for sequence, _ in planned]
        return tuple(bool(needing) and not needing.isdisjoint(state_indexes) for needing in self._needs)

    def stage(self, planned: list[Planned], batch: Batch, ids_only: bool) -> StagedSamples:
        """Stage the samples of a pass. `ids_only`: every sequence is (`Sequence.ids_only`)."""
        causal, blocks = CausalSamples(planned, batch, ids_only), BlockSamples(planned, batch, ids_only)
        index = np.concatenate((batch.sampled_rows, blocks.rows.reshape(-1))) if blocks.count else batch.sampled_rows
        count, total = len(batch.sampled_rows), len(index)
        samples_part = self._allocate(6, total)
        columns = samples_part.host
        at, owners, positions, forbid_eos, masked, ids = columns[:, :total]
        at[:], owners[:], positions[:] = index, batch.owners[index], batch.positions[index]
        # A causal row gives the byte after it, a block row its own.
        positions[:count] += 1
        np.less(positions, self._eos_from[owners], out=forbid_eos, casting="unsafe")
        rules_part = drafts_part = None
        if blocks.count:
            ids[count:] = batch.block[index[count:]]
            masked[count:] = blocks.masked(ids[count:])
            # Padding of shorter blocks belongs to the null request.
            if not blocks.even:
                columns[1:, count:total][:, ~blocks.inside.reshape(-1)] = 0
            rules_part = self._allocate(3, blocks.count)
            rules = rules_part.host[:, : blocks.count]
            steps = [(step.rule, step.bound, step.last_step) for step in blocks.steps]
            numbers, bounds, last = zip(*steps, strict=True)
            rules[0], rules[2], rules[1].view(np.float32)[:] = numbers, last, bounds
        if causal.drafts is not None:
            samples, lengths = causal.drafts
            drafts_part = self._allocate(1 + samples.shape[1], len(lengths))
            drafts = drafts_part.host[:, : len(lengths)]
            drafts[0], drafts[1:] = lengths, samples.T
        draws, truncates, penalizes = self.needs(planned)
        return StagedSamples(
            causal,
            blocks,
            count,
            total,
            whole=total == batch.padded and (not blocks.count or bool((at == np.arange(total)).all())),
            sampled=draws,
            truncated=truncates,
            penalized=penalizes,
            extra=self._drafted(planned, causal, blocks) if penalizes else [],
            masks=Masks(planned, causal, blocks, total)
            if not ids_only and any(sequence.constraint for sequence, _ in planned)
            else None,
            samples=samples_part,
            rules=rules_part,
            drafts=drafts_part,
        )

    def choose(self, states: Tensor, staged: StagedSamples) -> list[Tensor]:
        """Choose the bytes of causal rows, fill blocks, and store the ids for the next pass. Returns what to fetch.

        `states` are the decoder's, [rows with padding, d].
        """
        causal, blocks, count, total = staged.causal, staged.blocks, staged.count, staged.total
        if not total:
            return []
        tensors: list[Tensor] = []
        sent = staged.samples.tensor
        logits = self._forward.logits(states, None if staged.whole else sent[0])[:total]
        sent = sent[:, :total]
        params = self._params(staged, sent)
        if staged.masks is not None:
            params.allowed = staged.masks.allowed(self._device)
        owners, positions = sent[1], sent[2]
        known, chosen = self._forward.ids, None
        if count:
            some = params if count == total else part(params, slice(count))
            chosen = select(logits[:count], some, need_statistics=False)
        if blocks.count:
            step = self._fill(staged, logits[count:], sent[4:, count:], part(params, slice(count, total)))
            if staged.masks is not None:
                staged.masks.mend(step, None if chosen is None else chosen.ids, logits, params)
            known.write(owners[count:], positions[count:], step.ids.view(-1))
            tensors += blocks.results_of(step, logits[count:])
        if chosen is not None:
            accepted = self._verify(staged, chosen.ids, owners, positions)
            # After a block's own ids: where a causal row goes before it, that row gives its first byte.
            known.write(owners[:count], positions[:count], chosen.ids)
            tensors += causal.results_of(chosen, accepted, logits[:count])
        return tensors

    def _fill(self, staged: StagedSamples, logits: Tensor, sent: Tensor, params: SelectionParams) -> Unmasked:
        """One denoising step of every block; `sent` int32 [2, samples]: whether masked, and the ids."""
        assert staged.rules is not None
        blocks, shape = staged.blocks, staged.blocks.rows.shape
        rules, bounds, last = staged.rules.tensor[:, : blocks.count].unbind()
        rules, bounds, last = rules.long(), bounds.view(torch.float32), last.bool()
        masked, ids = sent[0].view(shape).bool(), sent[1].view(shape).long()
        return unmask(logits.view(*shape, -1), masked, ids, params, rules, bounds, last, everything=blocks.everything)

    def _verify(self, staged: StagedSamples, targets: Tensor, owners: Tensor, positions: Tensor) -> Tensor | None:
        """How many drafted bytes agree with their targets, int64 [drafts]; None where nothing is verified."""
        if staged.causal.drafts is None or staged.drafts is None:
            return None
        sent = staged.drafts.tensor[:, : len(staged.causal.drafts[1])]
        rows, lengths = sent[1:].T, sent[0].long()
        # What still stands where the targets will go is the draft.
        drafted = rows[:, :-1]
        return verify(targets[rows], self._forward.ids.read(owners[drafted], positions[drafted]), lengths)[0]

    def _drafted(
        self, planned: list[Planned], causal: CausalSamples, blocks: BlockSamples
    ) -> list[tuple[int, abc.Sequence[int]]]:
        """(sample, ids) where penalties count more than the final ids: drafted and filled bytes before it."""
        extra: list[tuple[int, abc.Sequence[int]]] = []
        for at, (sequence, plan) in enumerate(planned):
            if not sequence.params.penalizes:
                continue
            if plan.samples and sequence.draft:
                # A row counts the drafted bytes up to its own.
                first, drafted = causal.first_samples[at], plan.end - plan.samples + 1 - sequence.known
                extra += [(first + i, sequence.draft[: drafted + i]) for i in range(plan.samples) if drafted + i > 0]
            if plan.block_ids:
                before = [*sequence.draft, *(i for i in plan.block_ids if i != MASK_ID)]
                extra += [(blocks.first(at) + i, before) for i in range(len(plan.block_ids)) if before]
        return extra

    def _placeholders(self, count: int) -> tuple[Tensor, ...]:
        """Placeholders for an all-greedy pass: no kernel reads them, so those of state 0 are broadcast."""
        columns = self._null.get(count)
        if columns is None:
            tables = (table[:, :1].expand(-1, count) for table in (self._values, self._integers))
            columns = self._null[count] = tuple(column for table in tables for column in table.unbind())
        return columns

    def _params(self, staged: StagedSamples, sent: Tensor) -> SelectionParams:
        rows = sent[1]
        if staged.sampled or staged.penalized:
            columns = (*self._values[:, rows].unbind(), *self._integers[:, rows].unbind())
        else:
            columns = self._placeholders(len(rows))
        temperature, top_p, min_p, repetition, presence, frequency, top_k, seeds = columns
        counts = prompt_seen = bias = None
        penalized = staged.penalized
        if penalized:
            counts, prompt_seen, bias = self._counts[rows], self._prompt_seen[rows], self._bias[rows]
            if staged.extra:
                pairs = [(sample, token) for sample, tokens in staged.extra for token in tokens]
                at = torch.tensor(pairs, device=self._device).view(-1, 2)
                ones = torch.ones(len(pairs), dtype=torch.int32, device=self._device)
                counts.index_put_((at[:, 0], at[:, 1]), ones, accumulate=True)
        return SelectionParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=sent[2].long(),
            forbid_eos=sent[3].bool(),
            repetition=repetition if penalized else None,
            presence=presence if penalized else None,
            frequency=frequency if penalized else None,
            counts=counts,
            prompt_seen=prompt_seen,
            bias=bias,
            sampled=staged.sampled,
            truncated=staged.truncated,
            penalized=penalized,
        )


@dataclass
class StagedSamples:
    """The samples of a pass, on their way to the device: `count` of causal rows, then those of blocks; `total` in all.

    `whole`: they are all of the pass's rows, in order. `sampled`, `truncated`, `penalized`: whether any request draws,
    truncates, has penalties. `extra` has (sample, ids) where penalties count more than the final ids.
    """

    causal: CausalSamples
    blocks: BlockSamples
    count: int
    total: int
    whole: bool
    sampled: bool
    truncated: bool
    penalized: bool
    extra: list[tuple[int, abc.Sequence[int]]]
    masks: Masks | None
    #: What was staged: of samples int32 [6, samples], of blocks' steps [3, blocks], of drafts [1 + longest, drafts].
    samples: Part
    rules: Part | None
    drafts: Part | None

    def results(self, fetched: list[np.ndarray]) -> list[Result]:
        """The results of all sequences, from the fetched arrays of `Sampler.choose`."""
        results = [Result() for _ in self.causal.first_samples]
        arrays = iter(fetched)
        if self.blocks.count:
            self.blocks.take(arrays, results)
        if self.count:
            self.causal.take(arrays, results)
        return results
