"""Slow decoders for all methods, without a cache: the oracle of every faster path (design §2, §3, §5).

Everything is recomputed from the ids at every pass, so there is nothing to roll back and nothing that a schedule could
change. Nothing here is shared with the server or with the selection kernels; only the network's modules are.

What the paper (arXiv 2605.08044) leaves open is decided so: a BLT-D block is always whole and its surplus cut; a BLT-S
or BLT-DV draft is no longer than what can still be emitted, less the free byte (never shortened under
`paper_accounting`); penalties of a block row count the output and what earlier steps filled of its block; the first
byte of a BLT-DV draft is that of the pending byte's own row, and the unmasking rule chooses among the other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastblt.models.blt import Blt, BltOutput, CausalAttention, LatentRows
from fastblt.models.layers import Rope, rotate
from fastblt.models.reference_options import ENTROPY_RULES, METHODS, UNMASKINGS, DecodingOptions, Nfe, ReferenceOutput
from fastblt.models.reference_selection import Row, SamplingOptions, Selected, select
from fastblt.models.vocabulary import EOS_ID, MASK_ID, with_bos


@torch.no_grad()
def generate(
    model: Blt,
    prompt_ids: Sequence[int],
    params: SamplingOptions | None = None,
    method: DecodingOptions | str = "blt",
) -> ReferenceOutput:
    """Decode from a prompt (BOS is put in front unless there). Raises ValueError for a method the model cannot run."""
    options = DecodingOptions(method=method) if isinstance(method, str) else method
    if options.method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {options.method!r}")
    if options.unmasking not in UNMASKINGS or options.entropy_rule not in ENTROPY_RULES:
        raise ValueError(f"unmasking must be one of {UNMASKINGS} and entropy_rule one of {ENTROPY_RULES}")
    if options.method in ("blt-d", "blt-dv", "blt-dsv") and not model.config.has_diffusion:
        raise ValueError(f"{options.method} needs a checkpoint with a diffusion head")
    decoder = _Decoder(model, list(prompt_ids), params or SamplingOptions(), options)
    run = {
        "blt": decoder.blt,
        "blt-d": decoder.blt_d,
        "blt-s": decoder.blt_s,
        "blt-dv": decoder.blt_dv,
        "blt-dsv": decoder.blt_dsv,
    }
    run[options.method]()
    return decoder.result()


@torch.no_grad()
def patch_margins(model: Blt, ids: Sequence[int]) -> list[float]:
    """|entropy - threshold| at positions 1..T-1 of `ids`: how near each boundary decision was to falling otherwise."""
    entropies = model(torch.tensor([list(ids)])).entropies[0, 1:]
    return (entropies - model.config.patching_threshold).abs().tolist()


class _Decoder:
    def __init__(self, model: Blt, prompt_ids: list[int], params: SamplingOptions, options: DecodingOptions) -> None:
        self.model, self.params, self.options = model, params, options
        self.prompt = with_bos(prompt_ids)
        self.output: list[Selected] = []
        self.finish = "length" if params.max_tokens == 0 else ""
        self.nfe = self.prefill = Nfe()
        self.rounds = self.drafted = self.accepted = self.proposed = self.passed = self.wasted = 0
        self.steps: list[int] = []

    @property
    def ids(self) -> list[int]:
        """The whole sequence so far, x[0..n-1]."""
        return self.prompt + self.produced

    @property
    def produced(self) -> list[int]:
        return [selected.id for selected in self.output]

    @property
    def _starts_from_encoder(self) -> bool:
        return self.model.config.decoder_input == "encoder"

    def result(self) -> ReferenceOutput:
        return ReferenceOutput(
            ids=tuple(self.produced),
            logprobs=tuple(selected.logprob for selected in self.output),
            margins=tuple(selected.margin for selected in self.output),
            finish_reason=self.finish,
            nfe=self.nfe,
            prefill=self.prefill,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            proposed=self.proposed,
            passed=self.passed,
            wasted=self.wasted,
            steps=tuple(self.steps),
        )

    # Methods.

    def blt(self) -> None:
        """One byte at a time, each from the last row of a whole pass."""
        self._first_byte()
        while not self.finish:
            seen = self._see(self.ids)
            self.nfe += Nfe(entropy=1, encoder=1, global_=int(_opens(seen, len(self.ids))), decoder=1)
            self._emit([self._select(seen.logits[0, -1], self.produced, len(self.ids))])

    def blt_s(self) -> None:
        """Drafts of the decoder alone, verified in one pass (arXiv 2605.08044 §5.1, Algorithm 2)."""
        self._first_byte()
        while not self.finish:
            self._verify(self._draft_alone(self._draft_length(self.options.draft_length)))

    def blt_dv(self) -> None:
        """Diffusion blocks as drafts, verified in one pass (arXiv 2605.08044 §5.2)."""
        self._first_byte()
        while not self.finish:
            self._verify(self._draft_block(self._draft_length(self.options.block_size)))

    def blt_dsv(self) -> None:
        """Diffusion blocks, filtered by the decoder into BLT-S's drafts, verified in one pass (docs/methods.md)."""
        self._first_byte()
        while not self.finish:
            self._verify(self._draft_filtered(self._draft_length(self.options.draft_length)))

    def blt_d(self) -> None:
        """Diffusion blocks as they are (arXiv 2605.08044 §3.1, Algorithm 1). `align_blocks` fills the open patch byte
        by byte first."""
        uncounted = 0  # rows before this one have been in a pass already
        while not self.finish:
            ids = self.ids
            seen = self._see(ids)
            closed = any(_opens(seen, position + 1) for position in range(uncounted, len(ids)))
            uncounted = len(ids)
            if self.options.align_blocks and not _opens(seen, len(ids)):
                self.nfe += Nfe(entropy=1, encoder=1, global_=int(closed), decoder=1)
                self._emit([self._select(seen.logits[0, -1], self.produced, len(ids))])
                continue
            # The last latent there is: that of the patch that just closed, or of the open one, closed by force.
            self.nfe += Nfe(entropy=1, encoder=1, global_=1)
            latents = self._read_by_clean_rows(seen, len(ids)) + [seen.latents[0, -1]] * self.options.block_size
            self.rounds += 1
            self._emit(self._denoise(latents, self.options.block_size, first_is_next_byte=False))

    # Steps that methods are made of.

    def _first_byte(self) -> None:
        """The prompt's pass, whose last row gives the first byte."""
        if self.finish:
            return
        seen = self._see(self.prompt)
        self.nfe = self.prefill = Nfe(entropy=1, encoder=1, global_=1, decoder=1)
        self._emit([self._select(seen.logits[0, -1], [], len(self.prompt))])

    def _draft_length(self, wanted: int) -> int:
        if self.options.paper_accounting:
            return wanted
        return min(wanted, self.params.max_tokens - len(self.output) - 1)

    def _draft_latents(self) -> list[Tensor]:
        """Latents of the clean rows 0..n-2 and then the one that the pending byte's and all draft rows read.

        That is the newest patch that the last verification left closed; under `paper_accounting` the last one of a
        further upstream pass over x[0..n-1], open or not.
        """
        ids = self.ids
        if self.options.paper_accounting:
            self.nfe += Nfe(entropy=1, encoder=1, global_=1)
            seen = self._see(ids)
            return [*self._read_by_clean_rows(seen, len(ids) - 1), seen.latents[0, -1]]
        # A decoder row that starts from its encoder state needs an encoder pass; the pending byte has had none yet.
        self.nfe += Nfe(encoder=int(self._starts_from_encoder))
        latents = self._read_by_clean_rows(self._see(ids[:-1]), len(ids) - 1)
        return [*latents, latents[-1]]

    def _draft_alone(self, length: int) -> list[int]:
        """Ids of `length` decoder steps from the pending byte on."""
        if length == 0:
            return []
        latents = self._draft_latents()
        draft: list[int] = []
        for _ in range(length):
            ids = self.ids + draft
            logits = self._decode(ids, latents + [latents[-1]] * len(draft))
            self.nfe += Nfe(encoder=int(self._starts_from_encoder and bool(draft)), decoder=1)
            draft.append(self._select(logits[-1], self.produced + draft, len(ids)).id)
        return draft

    def _draft_filtered(self, length: int) -> list[int]:
        """The ids of `_draft_alone`, found by blocks whose bytes the decoder's causal rows keep or correct."""
        if length == 0:
            return []
        latents = self._draft_latents()
        draft: list[int] = []
        while len(draft) < length:
            if draft:
                self.nfe += Nfe(encoder=int(self._starts_from_encoder))
            missing, known = length - len(draft), len(self.ids) + len(draft)
            if missing <= 2:
                # A block and its filter would be two passes, too.
                logits = self._decode(self.ids + draft, latents + [latents[-1]] * len(draft))
                self.nfe += Nfe(decoder=1)
                draft.append(self._select(logits[-1], self.produced + draft, known).id)
                continue
            size = min(self.options.block_size, missing - 1)
            read = latents + [latents[-1]] * (len(draft) + size)
            block = [one.id for one in self._denoise(read, size, first_is_next_byte=True, draft=draft)]
            logits = self._decode(self.ids + draft + block, read)
            self.nfe += Nfe(encoder=int(self._starts_from_encoder), decoder=1)
            kept = [block[0]]
            for index in range(size):
                counted = self.produced + draft + block[: index + 1]
                kept.append(self._select(logits[known + index], counted, known + index + 1).id)
                if index + 1 == size or kept[-1] != block[index + 1]:
                    break
                self.passed += 1
            self.proposed += size - 1
            draft += kept
        return draft

    def _draft_block(self, length: int) -> list[int]:
        """Ids of a denoised block after the pending byte."""
        if length == 0:
            self.steps.append(0)
            return []
        latents = self._draft_latents()
        latents += [latents[-1]] * length
        return [selected.id for selected in self._denoise(latents, length, first_is_next_byte=True)]

    def _verify(self, draft: list[int]) -> None:
        """Emit what BLT would have, as far as the draft foresaw it, and one byte more."""
        ids = self.ids
        seen = self._see(ids + draft)
        ends = range(len(ids), len(ids) + len(draft) + 1)
        upstream = self.options.paper_accounting or any(_opens(seen, position) for position in ends)
        self.nfe += Nfe(entropy=1, encoder=1, global_=int(upstream), decoder=1)
        self.rounds += 1
        self.drafted += len(draft)
        verified: list[Selected] = []
        for index in range(len(draft) + 1):
            counted = self.produced + draft[:index]
            verified.append(self._select(seen.logits[0, len(ids) - 1 + index], counted, len(ids) + index))
            foreseen = index < len(draft) and draft[index] == verified[-1].id
            self.accepted += foreseen
            if not foreseen or verified[-1].id == EOS_ID:
                break
        self._emit(verified)

    def _denoise(
        self, latents: list[Tensor], size: int, *, first_is_next_byte: bool, draft: Sequence[int] = ()
    ) -> list[Selected]:
        """Fill a block of `size` masks after the ids and a draft; `latents` are those of all rows, the block's at the
        end.

        With `first_is_next_byte` the last clean row fills the first position in the first step.
        """
        ids, counted = [*self.ids, *draft], [*self.produced, *draft]
        block: list[Selected | None] = [None] * size
        step = 0
        while None in block:
            step += 1
            filled = [selected.id for selected in block if selected is not None]
            tokens = [MASK_ID if selected is None else selected.id for selected in block]
            logits = self._decode(ids, latents, tokens)
            self.nfe += Nfe(decoder=1)
            if first_is_next_byte and step == 1:
                block[0] = self._select(logits[len(ids) - 1], counted, len(ids))
            rows = {
                index: self._select(logits[len(ids) + index], counted + filled, len(ids) + index)
                for index in range(size)
                if block[index] is None
            }
            for index in unmask(rows, self.options, last=step == self.options.max_steps):
                block[index] = rows[index]
        self.steps.append(step)
        return [selected for selected in block if selected is not None]

    def _emit(self, selected: list[Selected]) -> None:
        for index, one in enumerate(selected):
            if self.finish:
                self.wasted += len(selected) - index
                return
            if one.id == EOS_ID:
                self.finish = "stop"
                continue
            self.output.append(one)
            if len(self.output) == self.params.max_tokens:
                self.finish = "length"

    def _select(self, logits: Tensor, counted: Sequence[int], position: int) -> Selected:
        row: Row = logits.float().cpu().numpy()
        return select(row, self.params, self.prompt, counted, position, position - len(self.prompt))

    # The network.

    def _see(self, ids: list[int]) -> BltOutput:
        return self.model(self._tensor(ids))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _read_by_clean_rows(self, seen: BltOutput, count: int) -> list[Tensor]:
        """The latents that rows 0..count-1 read: row p that of patch(p + 1) - 1."""
        patch = -1
        read: list[Tensor] = []
        for position in range(count + 1):
            patch += int(_opens(seen, position))
            if position > 0:
                read.append(seen.latents[0, patch - 1])
        return read

    def _decode(self, ids: list[int], latents: list[Tensor], block: Sequence[int] = ()) -> Tensor:
        """Logits [T + B, 260] of clean rows for `ids` and block rows after them, each reading its own latent."""
        model = self.model
        tokens = self._tensor(ids)
        states = model.local_encoder(
            model.embed(model.windows(tokens)), CausalAttention(model.config.encoder, len(ids), tokens.device)
        )
        rows = model.decoder_rows(tokens, states)
        if block:
            rows = torch.cat([rows, model.local_decoder.embed_tokens(self._tensor(list(block)))], dim=1)
        attend = _block_attention(model, len(ids), len(block), tokens.device)
        kv = model.local_decoder.latent_keys_values(torch.stack(latents)[None])
        hidden = model.local_decoder(rows, attend, LatentRows(kv))
        return model.lm_head(hidden)[0].float()


def unmask(rows: Mapping[int, Selected], options: DecodingOptions, *, last: bool = False) -> list[int]:
    """Which masked positions a step fills: at least one of `rows`, all of them if it is the `last` (design §2.7)."""
    if not rows or last or options.unmasking == "one_step":
        return list(rows)
    if options.unmasking == "confidence":
        sure = [index for index in rows if rows[index].confidence > options.confidence_threshold]
        return sure or [min(rows, key=lambda index: (-rows[index].confidence, index))]
    ascending = sorted(rows, key=lambda index: (rows[index].entropy, index))
    count = 0
    for size in range(1, len(ascending) + 1):
        values = [rows[index].entropy for index in ascending[:size]]
        # The largest of an ascending run is its last.
        if sum(values if options.entropy_rule == "inclusive" else values[:-1]) <= options.entropy_bound:
            count = size
    return ascending[: max(count, 1)]


def _opens(seen: BltOutput, position: int) -> bool:
    return bool(seen.starts[0, position])


def _block_attention(
    model: Blt, clean: int, block: int, device: torch.device
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """The decoder's self-attention over `clean` rows and a block after them (design §2.6), one batch row.

    A clean row sees itself and the window before it. Every block row sees the whole block and the window before its
    start. No clean row sees the block.
    """
    config = model.config.decoder
    window = config.window or clean + block
    seen = np.zeros((clean + block, clean + block), dtype=bool)
    for row in range(clean):
        seen[row, max(0, row - window + 1) : row + 1] = True
    for row in range(clean, clean + block):
        seen[row, max(0, clean - window + 1) : clean + block] = True
    mask = torch.from_numpy(seen).to(device)
    turns = Rope(config.head_dim, config.rope_theta, device).at(
        torch.arange(clean + block, device=device), clean + block
    )

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = config.num_heads // config.num_kv_heads
        q, k, v = rotate(q, turns), rotate(k, turns).repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * config.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).to(v.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    return attend
