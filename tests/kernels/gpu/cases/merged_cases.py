"""A model whose modules run merged gives what it gives in torch, in fp32 to a few last bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastblt.kernels.cpu.upstream import PatchRows, StoredPatches
from fastblt.kernels.gpu.linear import linear
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.types import RaggedRows
from fastblt.models.blt import Blt
from fastblt.models.config import StackConfig
from fastblt.models.layers import Rope
from fastblt.models.merged import merge
from tests.tiny import tiny_model

PAGE, PAGES, LENGTH = 16, 4, 64
#: Two requests: rows at these positions.
SPANS = ((1, 3, 5), (2, 20, 1))
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


class World:
    """Rows of two requests over stores that hold something everywhere."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.table = torch.arange(3 * PAGES, dtype=torch.int32).view(3, PAGES)
        rows = [(owner, start + i) for owner, start, count in SPANS for i in range(count)]
        self.owners, self.positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def attend(self, stack: StackConfig) -> PagedAttention:
        spans = [(sum(n for *_, n in SPANS[:i]), count) for i, (*_, count) in enumerate(SPANS)]
        at = RaggedRows(
            self.table, self.owners, self.positions, self.positions, self.positions + 1, spans, LENGTH, PAGE,
            stack.window,
        )  # fmt: skip
        stores = [self.draw(3 * PAGES * PAGE, 2, stack.num_kv_heads, stack.head_dim) for _ in range(stack.num_layers)]
        return PagedAttention(stores, Rope(stack.head_dim, stack.rope_theta).table(LENGTH), at)


def models(seed: int, decoder_input: str) -> tuple[Blt, Blt]:
    plain = tiny_model(seed, block_sizes=(4, 8), decoder_input=decoder_input)
    merged = copy.deepcopy(plain)
    merge(merged, invariant=seed % 2 == 1)
    return plain, merged


@pytest.mark.parametrize(("seed", "decoder_input"), [(0, "encoder"), (1, "embedding"), (2, "encoder"), (5, "encoder")])
@torch.inference_mode()
def test_every_module(seed: int, decoder_input: str) -> None:
    plain, merged = models(seed, decoder_input)
    config, world = plain.config, World()
    pad = plain.hash_window - 1
    ids = RequestIds(torch.randint(0, 260, (3, pad + LENGTH), generator=world.generator), pad)
    width = config.encoder.hidden_size
    states = PagedRows(world.draw(3 * PAGES * PAGE, width), world.table, PAGE)

    def both(name: str, call: Any) -> None:
        found = []
        for model in (plain, merged):
            world.generator.manual_seed(3)
            found.append(call(model))
        torch.testing.assert_close(found[1], found[0], **CLOSE, msg=lambda text: f"{name}: {text}")

    both("entropies", lambda m: m.patcher.stored_entropies(ids, world.attend(config.patcher)))

    def encode(model: Blt) -> tuple[Tensor, Tensor]:
        own = PagedRows(states.store.clone(), world.table, PAGE)
        return model.encode_stored(ids, own, world.attend(config.encoder)), own.store

    both("encoder", encode)
    latents = world.draw(5, config.decoder.num_layers, 2, config.cross_attn_k, config.decoder.num_kv_heads, 16)
    latents = latents[:, : len(plain.local_decoder.cross_attn_layers)].contiguous()
    slots = torch.randint(0, 5, (len(world.owners),), generator=world.generator, dtype=torch.int32)
    block = torch.where(torch.arange(len(slots)) % 3 == 0, 260, -1).int()
    for own in (None, block):
        known = states if decoder_input == "encoder" else ids
        both(
            "decoder",
            lambda m, known=known, own=own: m.local_decoder.stored_states(
                known, own, world.attend(config.decoder), StoredLatents(latents, slots)
            ),
        )
    vectors = world.draw(6, width * config.cross_attn_k)
    both("global", lambda m: m.global_transformer(vectors, world.attend(config.global_)))
    starts, ends = torch.tensor([0, 4, 1], dtype=torch.int32), torch.tensor([3, 4, 33], dtype=torch.int32)
    owners = torch.tensor([1, 1, 2], dtype=torch.int32)
    rows = [
        (o, p) for o, s, e in zip(owners.tolist(), starts.tolist(), ends.tolist(), strict=True) for p in range(s, e + 1)
    ]
    own, at = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    counts = ends - starts + 1
    patches = StoredPatches(
        states, owners, starts, ends, 34, PatchRows(own, at, (counts.cumsum(0) - counts).int(), counts)
    )
    both("pooling", lambda m: m.local_encoder.pool_stored(patches))
    from_global = world.draw(3, config.global_.hidden_size)

    def store(model: Blt) -> Tensor:
        kept = torch.zeros_like(latents)
        model.local_decoder.store_latents(from_global, kept, torch.tensor([2, 4, 1], dtype=torch.int32))
        return kept

    both("latents", store)


@torch.inference_mode()
def test_a_row_s_product_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(40, 100, generator=generator), torch.randn(72, 100, generator=generator)
    whole = linear(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-5, atol=1e-5)
    for count in (1, 7, 16, 17):
        assert torch.equal(linear(x[:count], weight), whole[:count])
    # Rows of a longer line, as parts of merged projections are.
    assert torch.equal(linear(torch.cat((x, x), 1)[:, :100], weight), whole)
