"""Measures drafts along held-out text. The model's own text repeats itself, which inflates acceptance.

The bytes of the text are given. A draft is made at a position from the text before it. Its bytes are compared with the
bytes that the model would choose at these positions, given the text before each. The common prefix is accepted, and the
next draft begins one byte after it. A BLT-S draft reads the text in place of its own bytes, so it differs from the
model's choice only by the latent. With a temperature both add the same noise, as in decoding (design §5).

All drafts of a text are rows after the same clean prefix, so they are computed together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt, CausalAttention, LatentRows
from fastblt.models.layers import Rope, rotate
from fastblt.models.patching import PatchRule, entropies
from fastblt.models.reference_options import Nfe
from fastblt.models.vocabulary import EOS_ID, MASK_ID, NEVER_PRODUCED

#: Drafts computed at once. The number is limited because each copies a window of keys.
_TOGETHER = 128


@dataclass
class Known:
    """The model's results for a text ids [T], computed once.

    choices [T + 1]: the id it would choose at each position, given those before (0 at BOS). starts [T + 1]: patch
    starts. patch_of [T + 1]: the patch of each position. rows [T, d]: decoder inputs. keys, values: of the decoder's
    clean rows, by layer. latent_kv [P, ...]: the decoder's keys and values of each patch's latent. forced_kv [T, ...]:
    the same for each byte's patch, closed by force after that byte. noise [T + 1, 260]: by position.
    """

    ids: Tensor
    choices: Tensor
    starts: NDArray[np.bool_]
    patch_of: NDArray[np.int64]
    rows: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    latent_kv: Tensor
    forced_kv: Tensor
    noise: Tensor
    temperature: float


@torch.inference_mode()
def know(model: Blt, ids: Tensor, temperature: float = 0.0, seed: int = 0) -> Known:
    """Run a text ids int64 [T] through the model, and compute the latents for drafts at every position."""
    config = model.config
    length = len(ids)
    entropy = entropies(model.patcher(ids[None], CausalAttention(config.patcher, length, ids.device)))[0]
    rule = PatchRule(config.patching_threshold, config.max_patch_length)
    starts = torch.tensor(rule.starts(entropy.tolist()))
    patch_of = starts.long().cumsum(0) - 1
    states = model.local_encoder(
        model.embed(model.windows(ids[None])), CausalAttention(config.encoder, length, ids.device)
    )
    latents = model.latents(states, starts[None])[0]
    kv = model.local_decoder.latent_keys_values(latents)
    forced_kv = model.local_decoder.latent_keys_values(_forced_latents(model, states[0], starts, latents))
    rows = model.decoder_rows(ids[None], states)
    attend = _Remembering(CausalAttention(config.decoder, length, ids.device))
    hidden = model.local_decoder(rows, attend, LatentRows(kv[(patch_of[1:] - 1)][None]))
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(length + 1, 260, generator=generator, dtype=torch.float64).clamp_min(1e-30)
    noise = temperature * -(-uniform.log()).log().float()
    choices = torch.zeros(length + 1, dtype=torch.long)
    choices[1:] = _choose(model.lm_head(hidden)[0], noise[1:])
    return Known(
        ids,
        choices,
        starts.numpy(),
        patch_of.numpy(),
        rows[0],
        attend.keys,
        attend.values,
        kv,
        forced_kv,
        noise,
        temperature,
    )


class _Remembering:
    """An attention that stores the keys (not rotated) and values of every layer."""

    def __init__(self, inner: CausalAttention) -> None:
        self._inner = inner
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k[0])
        self.values.append(v[0])
        return self._inner(layer, q, k, v)


def _forced_latents(model: Blt, states: Tensor, starts: Tensor, latents: Tensor) -> Tensor:
    """Latents [T, dg]: for each byte, that of its patch, closed by force right after it."""
    length = len(states)
    places = (starts.long().cumsum(0) - 1)[:length]
    first = torch.nonzero(starts[:length])[:, 0][places]
    last = torch.arange(length)
    index = first[:, None] + torch.arange(int((last - first).max()) + 1)
    inside = index <= last[:, None]
    vectors = model.local_encoder.pool(states[index.clamp_max(length - 1)], inside).flatten(1)
    # A force-closed patch has its patch's position, and sees the closed patches before it.
    global_ = model.config.global_
    rope = Rope(global_.head_dim, global_.rope_theta)
    closed = CausalAttention(global_, len(latents), states.device)
    turns, closed_turns = rope.at(places, length), rope.at(torch.arange(len(latents)), length)
    sees = torch.arange(len(latents)) < places[:, None]
    whole = model.local_encoder.pool(*_padded(states, starts)).flatten(1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = len(latents)
        before = closed(layer, q[None, :count], k[None, :count], v[None, :count])[0]
        groups = q.shape[1] // k.shape[1]
        query = rotate(q[count:], turns)
        keys = rotate(k[:count], closed_turns).repeat_interleave(groups, 1)
        own = (query * rotate(k[count:], turns).repeat_interleave(groups, 1)).sum(-1)
        others = torch.einsum("thd,phd->thp", query, keys).masked_fill(~sees[:, None], float("-inf"))
        weights = torch.softmax(torch.cat([others, own[..., None]], -1) * q.shape[-1] ** -0.5, -1)
        values = v.repeat_interleave(groups, 1)
        after = torch.einsum("thp,phd->thd", weights[..., :-1], values[:count]) + weights[..., -1:] * values[count:]
        return torch.cat([before, after])

    return model.global_transformer(torch.cat([whole, vectors]), attend)[len(latents) :]


def _padded(states: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The states of every patch, padded to [P, L, d], and which of them exist, bool [P, L]."""
    length = len(states)
    first = torch.nonzero(starts[:length])[:, 0]
    end = torch.cat([first[1:], torch.tensor([length])])
    index = first[:, None] + torch.arange(int((end - first).max()))
    return states[index.clamp_max(length - 1)], index < end[:, None]


def _choose(logits: Tensor, noise: Tensor) -> Tensor:
    """The chosen ids [...] for logits and noise [..., 260], without EOS."""
    scores = logits.float() + noise
    scores[..., [*NEVER_PRODUCED, EOS_ID]] = float("-inf")
    return scores.argmax(-1)


@dataclass(frozen=True)
class Drafter:
    """A way to draft `length` bytes: `blt-s` or `blt-dv` (in one step). They read the newest closed latent or, with
    `paper`, that of the open patch, closed by force."""

    method: str
    length: int
    paper: bool = False

    @property
    def name(self) -> str:
        size = f"k{self.length}" if self.method == "blt-s" else f"{self.length} 1step"
        return f"{self.method}{' ' if self.method == 'blt-s' else '-'}{size}{' paper' if self.paper else ''}"


@torch.inference_mode()
def drafts(model: Blt, known: Known, drafter: Drafter, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drafted ids [S, length] at positions n = `places` >= 2. The last known byte is at n - 1."""
    parts = [
        _draft(model, known, drafter, torch.from_numpy(places[first : first + _TOGETHER]))
        for first in range(0, len(places), _TOGETHER)
    ]
    return np.concatenate(parts)


def _draft(model: Blt, known: Known, drafter: Drafter, places: Tensor) -> NDArray[np.int64]:
    offsets = torch.arange(drafter.length)
    if drafter.method == "blt-s":
        # Rows n - 1, n, ... Each gives the byte after its position.
        rows = known.rows[places[:, None] - 1 + offsets]
        own = offsets[:, None] >= offsets
        positions = places[:, None] - 1 + offsets
        target = positions + 1
    else:
        # The row of byte n - 1 gives the byte at n. Masked rows at n, n + 1, ... give the bytes at their own positions.
        mask = model.local_decoder.embed_tokens(torch.tensor(MASK_ID)).expand(len(places), drafter.length, -1)
        rows = torch.cat([known.rows[places - 1][:, None], mask], 1)
        own = torch.ones(drafter.length + 1, drafter.length + 1, dtype=torch.bool)
        own[0, 1:] = False
        positions = places[:, None] - 1 + torch.arange(drafter.length + 1)
        target = places[:, None] + offsets
    block_from = 1 if drafter.method == "blt-dv" else None
    logits = tail_logits(model, known, rows, positions, own, _read(known, drafter.paper, places), block_from)
    if drafter.method == "blt-dv":
        logits = torch.cat([logits[:, :1], logits[:, 2:]], 1)
    return _choose(logits, known.noise[target.clamp_max(len(known.noise) - 1)]).numpy()


def _read(known: Known, paper: bool, places: Tensor) -> Tensor:
    """Keys and values [S, C, 2, k, Hkv, D] of the latents that drafts at `places` read."""
    if paper:
        return known.forced_kv[places - 1]
    return known.latent_kv[torch.from_numpy(known.patch_of)[places - 1] - 1]


def tail_logits(
    model: Blt, known: Known, rows: Tensor, positions: Tensor, own: Tensor, latent: Tensor, block_from: int | None
) -> Tensor:
    """Logits [S, R, 260] of decoder rows [S, R, d] at consecutive `positions` [S, R] after a clean prefix.

    Row 0 is at the position right after the prefix. own bool [R, R]: which of these rows each one sees. Rows from
    `block_from` on form a block and share the window of its first position (design §2.6).
    """
    stack = model.config.decoder
    window = stack.window or len(known.ids)
    count, size = positions.shape
    keys_at = positions[:, :1] - window + torch.arange(window)
    begins = positions.clone()
    if block_from is not None:
        begins[:, block_from:] = positions[:, block_from : block_from + 1]
    sees = (keys_at[:, None] > begins[..., None] - window) & (keys_at[:, None] >= 0)
    sees = torch.cat([sees, own.expand(count, -1, -1)], 2)
    last = len(known.ids) + size + 1
    rope = Rope(stack.head_dim, stack.rope_theta)
    turns, keys_turns = rope.at(positions, last), rope.at(keys_at.clamp_min(0), last)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        clean = keys_at.clamp_min(0)
        keys = torch.cat([rotate(known.keys[layer][clean], keys_turns), rotate(k, turns)], 1)
        values = torch.cat([known.values[layer][clean], v], 1)
        groups = q.shape[2] // k.shape[2]
        keys, values = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
        scores = torch.einsum("srhd,skhd->shrk", rotate(q, turns), keys) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores.masked_fill(~sees[:, None], float("-inf")), -1)
        return torch.einsum("shrk,skhd->srhd", weights, values)

    read = LatentRows(latent[:, None].expand(-1, size, *latent.shape[1:]))
    return model.lm_head(model.local_decoder(rows, attend, read))


@torch.inference_mode()
def blocks(model: Blt, known: Known, size: int, places: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Ids [S, size] of BLT-D's blocks at `places`. A step unmasks all positions whose confidence exceeds the threshold,
    or else the most confident one."""
    at = torch.from_numpy(places)
    positions = at[:, None] + torch.arange(size)
    table = model.local_decoder.embed_tokens
    shown = torch.full(positions.shape, MASK_ID)
    own = torch.ones(size, size, dtype=torch.bool)
    while bool((masked := shown == MASK_ID).any()):
        logits = tail_logits(model, known, table(shown), positions, own, known.forced_kv[at - 1], 0)
        scores = logits.float()
        scores[..., [*NEVER_PRODUCED, EOS_ID]] = float("-inf")
        confidence = torch.softmax(scores / (known.temperature or 1.0), -1).amax(-1).masked_fill(~masked, -1.0)
        best = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        fill = masked & ((confidence > threshold) | best)
        shown = torch.where(fill, _choose(logits, known.noise[positions]), shown)
    return shown.numpy()


@dataclass
class Rounds:
    """Totals of drafting and verifying along texts: bytes drafted and accepted, their passes, and the passes that plain
    BLT needs for the same bytes."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: Nfe = field(default_factory=Nfe)
    plain: Nfe = field(default_factory=Nfe)

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted

    @property
    def bytes(self) -> int:
        return self.accepted + self.rounds

    @property
    def bytes_a_round(self) -> float:
        return self.bytes / self.rounds

    def weights(self, parameters: ModuleParameters) -> float:
        """Weights read, relative to BLT's for the same bytes, over all modules."""
        return _weights(self.passes, parameters) / _weights(self.plain, parameters)

    def go(self, model: Blt, known: Known, drafter: Drafter, first: int) -> None:
        """Add the rounds along a text from position `first` on. The text is cut into stretches, computed together."""
        last = len(known.ids) - drafter.length
        ends = np.linspace(first, last, 1 + min(_TOGETHER, max(1, (last - first) // 48))).astype(np.int64)
        places, ends = ends[:-1], ends[1:]
        choices = known.choices.numpy()
        while len(places):
            made = drafts(model, known, drafter, places)
            wanted = choices[places[:, None] + np.arange(drafter.length)]
            leading = np.cumprod(made == wanted, 1).sum(1)
            for place, accepted in zip(places.tolist(), leading.tolist(), strict=True):
                self._round(model, known.starts, drafter, place, accepted)
            places = places + leading + 1
            places, ends = places[places < ends], ends[places < ends]

    def _round(self, model: Blt, starts: NDArray[np.bool_], drafter: Drafter, place: int, accepted: int) -> None:
        steps = drafter.length if drafter.method == "blt-s" else 1
        fed = int(model.config.decoder_input == "encoder")
        extra = int(drafter.paper)
        upstream = extra + int(extra or starts[place : place + drafter.length + 1].any())
        self.passes += Nfe(1 + extra, 1 + extra + fed * (steps - extra), upstream, 1 + steps)
        made = accepted + 1
        self.plain += Nfe(made, made, int(starts[place : place + made].sum()), made)
        self.rounds += 1
        self.drafted += drafter.length
        self.accepted += accepted


def _weights(passes: Nfe, parameters: ModuleParameters) -> int:
    return (
        passes.entropy * parameters.patcher
        + passes.encoder * parameters.encoder
        + passes.global_ * parameters.global_
        + passes.decoder * parameters.decoder
    )
